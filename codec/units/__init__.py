"""Speech units: a small integer for every frame of speech, which knows more of what is said than of who says it.

    units = load_units("units")                             # a folder that `save`, or `codec units train`, wrote
    ids, num_frames = units.encode(audio, num_samples)      # int64 [B, F], -1 past a row's end; int64 [B]
    kept, durations = deduplicate(ids[0, : num_frames[0]])  # runs of one unit become one; `expand` is the inverse

Units are features of a source (`sources`) that an assigner (`assigners`) turned into integers: the nearest of k-means'
centroids, what a trained network says, or the codes of a product quantizer.
"""

from codec.units.assigners import Assigner, Centroids, PredictiveEncoder, UnitHead
from codec.units.clustering import kmeans
from codec.units.runs import deduplicate, expand
from codec.units.sources import UnitSource, codec_source, log_mel_source, speech_model_source
from codec.units.speech_units import SpeechUnits, load_units, train_units

__all__ = [
    "Assigner",
    "Centroids",
    "PredictiveEncoder",
    "SpeechUnits",
    "UnitHead",
    "UnitSource",
    "codec_source",
    "deduplicate",
    "expand",
    "kmeans",
    "load_units",
    "log_mel_source",
    "speech_model_source",
    "train_units",
]
