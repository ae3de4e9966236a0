"""The COSMOS loss over the global batch: forward and gradients of the features, formed without autograd."""

from cosmos_scale.loss.cosmos_loss import CosmosLoss, LossOutput

__all__ = ["CosmosLoss", "LossOutput"]
