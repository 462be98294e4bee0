"""timm backbones: made residual mixtures of experts, loaded with a dense core, seen as feature pyramids."""

from rmoe.backbones import cvt  # noqa: F401  registers CvT with timm
