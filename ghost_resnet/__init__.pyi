from .ghost_resnet import GhostResNet as GhostResNet
from .layers import GhostModule as GhostModule
