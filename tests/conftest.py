import contextlib
import resource
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Shared machines stall for seconds at times; a deadline would measure them, not the code.
# The fixture that sets the number of threads means the same for every example that hypothesis draws.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")


# Tiny models gain nothing from a second thread; the tests for which threads matter ask for `num_threads`.
torch.set_num_threads(1)


# Whoever runs the tests by nohup or in the background ignores signals, and so would the commands that tests start.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def full_disk() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A full disk, simulated: a context manager in which no file grows beyond 4000 bytes.

    The test says where it begins and ends, since pytest writes its progress between a test and the end of its fixtures:
    where that goes to a file, the file would be the first that is too large.
    """

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return entered
