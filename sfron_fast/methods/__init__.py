"""Published unlearning methods, one a file, each by what it puts in the places of SFR-on's parts.

        (S) saliency        (F) forgetting part              (R) remaining part
FT      -                   -                                descent on the retain set
GA      -                   ascent on the forget set         -
RL      -                   wrong labels                     descent on the retain set
SalUn   hard, for F and R   wrong labels                     descent on the retain set
BT      -                   an untrained teacher             the original as teacher
SCRUB   -                   away from the original           descent, the original as teacher
SA      -                   towards uniform predictions (*)  descent, penalty by a fixed Fisher
AMUN    -                   adversarial examples, as said    descent, also on the forget set
TRW     -                   the original as teacher (+)      descent on the retain set

(*) or, of a diffusion model (``task=Denoising(instead=Surrogate())``), towards noise
(+) without the class that goes, tilted towards the classes like it

For language models (``task=Language()``), with descent on the retain set but where it says so:

        (F) forgetting part
GradDiff  ascent
NPO       ascent, weighted by how likely a sequence still is beside what it was
SimNPO    the same by its length, without what it was
IdkDPO    descent on "I do not know" and ascent, weighted by both
WGA       ascent, tokens weighted by their probability
SatImp    ascent, tokens weighted by saturation and importance
CE-U      ascent, tokens weighted by their odds
UNDIAL    the model before with the label's logit lowered as a teacher
RMU       hidden states towards a random direction (retain set: where they were)
LUNE      descent on wrong answers, low-rank adapters alone (retain set: if there is one)
KUnBR     GradDiff, then again on the densest blocks, each in the model as it was
R2F       one step up a gradient decoded from those of low-rank factors (retain set: not seen)
SIU       descent on another name for what is in an image, and the model before as a teacher but
          for the name, low-rank adapters alone (retain set: among the same batches)

For generators that draw identities from latents: SUGAR diverts each to a surrogate of its own,
under the penalty of a Fisher of sampled outputs.

For clients of federated learning:

Ferrari    descent on how much a feature of the inputs moves the outputs, by one client
Certified  a Newton step on what all clients keep, a bound on what is left, and noise (convex)
"""

from ..models.lora import add_lora, lora_off, merge_lora
from ..models.spectral import clip_spectral_norms, spectral_norms
from .adversarial import Adversarial, adversarial_examples
from .amun import amun
from .bad_teacher import bad_teacher
from .certified import Certificate, certified
from .ceu import ceu
from .elastic import sampled_fisher
from .ferrari import ferrari
from .finetune import finetune
from .grad_diff import grad_diff
from .gradient_ascent import gradient_ascent
from .idk_dpo import idk_dpo
from .kunbr import kunbr
from .lune import lune
from .npo import npo
from .r2f import Decoder, fit_decoder, r2f
from .random_label import random_label, wrong_labels
from .rmu import rmu
from .salun import gradient_saliency, salun
from .satimp import satimp
from .scrub import scrub
from .selective_amnesia import selective_amnesia
from .simnpo import simnpo
from .siu import siu
from .sugar import sugar
from .surrogate_latents import SurrogateLatents, fit_surrogates
from .trw import class_means, trw
from .undial import undial
from .wga import wga

__all__ = [
    "Adversarial",
    "Certificate",
    "Decoder",
    "SurrogateLatents",
    "add_lora",
    "adversarial_examples",
    "amun",
    "bad_teacher",
    "certified",
    "ceu",
    "class_means",
    "clip_spectral_norms",
    "ferrari",
    "finetune",
    "fit_decoder",
    "fit_surrogates",
    "grad_diff",
    "gradient_ascent",
    "gradient_saliency",
    "idk_dpo",
    "kunbr",
    "lora_off",
    "lune",
    "merge_lora",
    "npo",
    "r2f",
    "random_label",
    "rmu",
    "salun",
    "sampled_fisher",
    "satimp",
    "scrub",
    "selective_amnesia",
    "simnpo",
    "siu",
    "spectral_norms",
    "sugar",
    "trw",
    "undial",
    "wga",
    "wrong_labels",
]
