"""The one error tree. Every message names the value, the limit and the remedy, on one line."""


class HalveError(ValueError):
    """The input or the request is wrong; the command line prints the message and exits with 2."""


class CheckpointError(HalveError):
    """A model folder is missing, incomplete, corrupt, or holds values nothing can be computed with."""


class UnsupportedModelError(HalveError):
    """The architecture, or a config field that changes the maths, is not one this decoder computes."""


class RecipeError(HalveError):
    """A step, an option or a combination of them cannot be applied to this model."""


class DataError(HalveError):
    """A text, calibration or question file is missing, malformed or empty."""


class OutputError(HalveError):
    """The result cannot be written where it was asked for."""


class StaleKernelsError(HalveError):
    """The compiled kernels were built from other sources than this package."""
