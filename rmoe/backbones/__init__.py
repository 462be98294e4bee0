"""timm backbones: made residual mixtures of experts, loaded with a dense core, seen as feature pyramids."""
