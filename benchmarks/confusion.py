"""Draw the confusion matrix of a metrics file, as `ghost-resnet evaluate --json` writes it.

python benchmarks/confusion.py metrics.json confusion.svg
"""

import json
import sys
from pathlib import Path

from matplotlib import rc_context

from ghost_resnet.evaluation import Metrics
from ghost_resnet.files import write_text
from ghost_resnet.report import STYLE, confusion_svg

source, target = map(Path, sys.argv[1:])
with rc_context(STYLE):
    write_text(target, confusion_svg(Metrics.from_dict(json.loads(source.read_text(encoding="utf-8")))))
