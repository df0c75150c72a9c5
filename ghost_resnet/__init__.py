"""Ghost-ResNet image backbones for timm and torch.hub.

Importing this package is cheap: names load when they are first used, and the networks are registered with
timm as soon as timm itself is imported, before or after this package.
"""

import lazy_loader
import wrapt

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("timm")
def _register_with_timm(_timm: object) -> None:
    from . import ghost_resnet  # noqa: F401  (its decorators register the networks)
