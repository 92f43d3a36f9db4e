"""Protections: each a frozen dataclass with its paper's defaults that perturbs canvases in place."""

from antidiffusion.recipes.advdm import AdvDM
from antidiffusion.recipes.alternation import Alternation
from antidiffusion.recipes.anti_diffusion import AntiDiffusion
from antidiffusion.recipes.anti_dreambooth import ASPL, FSMG
from antidiffusion.recipes.attention import Attention
from antidiffusion.recipes.base import PERTURBATION, PROMPT, TUNING, Recipe, Trace, posteriors
from antidiffusion.recipes.diffusion_guard import DiffusionGuard
from antidiffusion.recipes.latents import Latents
from antidiffusion.recipes.mist import Mist
from antidiffusion.recipes.official import OfficialAntiDiffusion
from antidiffusion.recipes.photoguard import PhotoGuard
from antidiffusion.recipes.photoguard_diffusion import PhotoGuardDiffusion
from antidiffusion.recipes.random_sign import RandomSign
from antidiffusion.recipes.sds import SDSMinus, SDSPlus
from antidiffusion.recipes.simac import SimAC

__all__ = [
    "ASPL",
    "FSMG",
    "PERTURBATION",
    "PRESETS",
    "PROMPT",
    "RECIPES",
    "TUNING",
    "AdvDM",
    "Alternation",
    "AntiDiffusion",
    "Attention",
    "DiffusionGuard",
    "Latents",
    "Mist",
    "OfficialAntiDiffusion",
    "PhotoGuard",
    "PhotoGuardDiffusion",
    "RandomSign",
    "Recipe",
    "SDSMinus",
    "SDSPlus",
    "SimAC",
    "Trace",
    "posteriors",
]

RECIPES: dict[str, Recipe] = {
    "anti-diffusion": AntiDiffusion(),
    "official": OfficialAntiDiffusion(),
    "random-sign": RandomSign(),
    "advdm": AdvDM(),
    "sds-minus": SDSMinus(),
    "sds-plus": SDSPlus(),
    "photoguard": PhotoGuard(),
    "photoguard-diffusion": PhotoGuardDiffusion(),
    "mist": Mist(),
    "fsmg": FSMG(),
    "aspl": ASPL(),
    "simac": SimAC(),
    "diffusion-guard": DiffusionGuard(),
    "attention": Attention(),
    "latents": Latents(),
}

PRESETS: dict[str, dict[str, Recipe]] = {
    "anti-diffusion": {
        "quick": AntiDiffusion(rounds=0, steps=25, tuning_steps=0),
        "strong": AntiDiffusion(rounds=7),
    },
    "latents": {"quick": Latents(steps=12), "strong": Latents(steps=48)},
}
