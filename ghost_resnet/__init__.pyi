from .classifier import GarbageClassifier as GarbageClassifier
from .classifier import Prediction as Prediction
from .distillation import distill as distill
from .evaluation import Metrics as Metrics
from .evaluation import evaluate as evaluate
from .explain import Explainer as Explainer
from .explain import Explanation as Explanation
from .folding import fold_batch_norm as fold_batch_norm
from .ghost_resnet import GhostResNet as GhostResNet
from .layers import GhostModule as GhostModule
from .recipes import Recipe as Recipe
from .surgery import from_resnet as from_resnet
from .training import Run as Run
from .training import finetune as finetune

__version__: str
