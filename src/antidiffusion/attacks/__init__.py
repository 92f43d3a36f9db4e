"""The misuse we defend against, shipped so that protections can be measured; run it on pictures you may use."""

from antidiffusion.attacks.base import Attack
from antidiffusion.attacks.custom_diffusion import CustomDiffusion
from antidiffusion.attacks.diffedit import DiffEdit
from antidiffusion.attacks.dreambooth import DreamBooth
from antidiffusion.attacks.inpaint import Inpaint
from antidiffusion.attacks.lora import LoRA
from antidiffusion.attacks.masactrl import MasaCtrl
from antidiffusion.attacks.prompt_to_prompt import PromptToPrompt
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.attacks.textual_inversion import TextualInversion
from antidiffusion.attacks.tuned import Tuning

EDITS: dict[str, Attack] = {
    "sdedit": SDEdit(),
    "inpaint": Inpaint(),
    "diffedit": DiffEdit(),
    "masactrl": MasaCtrl(),
    "prompt-to-prompt": PromptToPrompt(),
}
TUNINGS: dict[str, Tuning] = {
    "dreambooth": DreamBooth(),
    "lora": LoRA(),
    "textual-inversion": TextualInversion(),
    "custom-diffusion": CustomDiffusion(),
}
