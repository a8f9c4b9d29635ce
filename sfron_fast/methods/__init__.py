"""Published unlearning methods, one a file, each by what it puts in the places of SFR-on's parts.

        (S) saliency        (F) forgetting part              (R) remaining part
FT      -                   -                                descent on the retain set
GA      -                   ascent on the forget set         -
RL      -                   wrong labels                     descent on the retain set
SalUn   hard, for F and R   wrong labels                     descent on the retain set
BT      -                   an untrained teacher             the original as teacher
SCRUB   -                   away from the original           descent, the original as teacher
SA      -                   towards uniform predictions      descent, penalty by a fixed Fisher
"""

from .bad_teacher import bad_teacher
from .finetune import finetune
from .gradient_ascent import gradient_ascent
from .random_label import random_label, wrong_labels
from .salun import gradient_saliency, salun
from .scrub import scrub
from .selective_amnesia import selective_amnesia
from .sfron import Recipe

__all__ = [
    "Recipe",
    "bad_teacher",
    "finetune",
    "gradient_ascent",
    "gradient_saliency",
    "random_label",
    "salun",
    "scrub",
    "selective_amnesia",
    "wrong_labels",
]
