# The same as the commands in the README, for those who have make.
.PHONY: demo test fast

demo:   ## encode and decode speech with the bundled model
	python3 tools/check.py demo
test:   ## lint, types, tests
	python3 tools/check.py test
fast:   ## the same without the slow tests
	python3 tools/check.py test --fast
