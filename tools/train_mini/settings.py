"""What a training is made of. No import that takes time: the processes that render read this too."""

from dataclasses import dataclass, field, replace

SIZE = 128  # pixels, the side of every training picture
TOKENS = 48  # length of the text window; the longest of 1,756 captions has 41 tokens, punctuation among them
SCALING = 0.18215  # Stable Diffusion's factor between the autoencoder's latents and the UNet's
CAPTION_BYTES = 320  # the longest caption has 34 words of at most eight letters


@dataclass(frozen=True)
class DataSettings:
    """How many pictures: people never trained on, portraits, dead leaves, and pages of letters."""

    held: int = 256
    portraits: int = 26_000
    textures: int = 9_000
    text: int = 2_000

    def counts(self) -> dict[str, int]:
        return {"held": self.held, "portraits": self.portraits, "textures": self.textures, "text": self.text}


def shared(batch: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` pictures among the kinds of a batch in its proportions, one of each at least; the first is largest.

    Raises:
        ValueError: If there are more kinds than pictures.
    """
    if total < len(batch):
        raise ValueError(f"expected at least {len(batch)} pictures a step, one of each kind, got {total}")
    first, *others = batch
    parts = {kind: max(1, round(batch[kind] * total / sum(batch.values()))) for kind in others}
    return {first: total - sum(parts.values()), **parts}


@dataclass(frozen=True)
class EncoderSettings:
    """Distillation of the teacher's encoder.

    Arguments:
        batch: Pictures of each kind a step, changed by noise, JPEG, blur or size in seven of eight.
        attacked: Pictures a step that are attacked besides; a multiple of three.
        attack_steps: Sign steps of that attack.
        radius: Smallest and largest L-infinity radius of attacks and noise, in steps of 1/255.
    """

    batch: dict[str, int] = field(default_factory=lambda: {"portraits": 24, "textures": 12, "text": 4})
    attacked: int = 18
    attack_steps: int = 3
    radius: tuple[float, float] = (2.0, 16.0)
    rate: float = 1e-3
    warmup: int = 200
    seed: int = 0

    def sized(self, total: int) -> "EncoderSettings":
        """Return these settings with `total` pictures a step in the same proportions, and as many attacked ones."""
        thirds = round(self.attacked * total / sum(self.batch.values()) / 3)
        return replace(self, batch=shared(self.batch, total), attacked=3 * max(1, thirds))


@dataclass(frozen=True)
class DecoderSettings:
    """Reconstruction; the two weights are norms of gradients at the decoder's output beside L1's.

    Arguments:
        patience: Share of the time after which the discriminator's weight is whole; it grows from zero.
    """

    batch: dict[str, int] = field(default_factory=lambda: {"portraits": 40, "textures": 5, "text": 3})
    perceptual: float = 0.6
    adversarial: float = 0.35
    patience: float = 0.25
    critic_width: int = 48
    rate: float = 1e-3
    warmup: int = 200
    seed: int = 0

    def sized(self, total: int) -> "DecoderSettings":
        """Return these settings with `total` pictures a step in the same proportions."""
        return replace(self, batch=shared(self.batch, total))


@dataclass(frozen=True)
class UnetSettings:
    """UNet and text encoder.

    Arguments:
        prediction: "epsilon" or "v_prediction".
        channels: Of the UNet's levels, multiples of 32.
        vocabulary: Most entries that the tokenizer learns, two forms of every letter included.
        drop: Share of pictures shown without their caption, for guidance without a classifier.
        min_snr: Largest signal-to-noise ratio at which a step counts in full (Hang et al., 2023, arXiv 2303.09556).
    """

    prediction: str = "epsilon"
    channels: tuple[int, ...] = (64, 128, 192)
    layers: int = 1
    text_width: int = 160
    text_layers: int = 4
    vocabulary: int = 1024
    batch: int = 256
    drop: float = 0.1
    min_snr: float = 5.0
    rate: float = 1e-3
    warmup: int = 200
    seed: int = 0


@dataclass(frozen=True)
class MeasureSettings:
    """What the last stage looks at: pictures of each kind, steps of its attacks, and samples."""

    pictures: int = 64
    attacked: int = 16
    radii: tuple[int, ...] = (4, 8, 16)
    attack_steps: int = 14
    samples: int = 256
    batch: int = 64
    sampling_steps: int = 25
    guidance: float = 4.0


@dataclass(frozen=True)
class Settings:
    """A whole run. `models` are the UNets trained on the one autoencoder; the first is the embedded model."""

    channels: tuple[int, ...] = (32, 64, 96, 128)  # of the autoencoder
    data: DataSettings = DataSettings()
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    models: dict[str, UnetSettings] = field(
        default_factory=lambda: {
            "mini": UnetSettings(),
            "second": UnetSettings("v_prediction", (64, 96, 160), text_width=128, vocabulary=340, seed=1),
        }
    )
    measure: MeasureSettings = MeasureSettings()


def tiny() -> Settings:
    """Return a run of a minute or two on a processor: everything happens, nothing is learnt."""
    whole, small = Settings(), (32, 32, 64)
    batch = {"portraits": 4, "textures": 2, "text": 2}
    return replace(
        whole,
        channels=(16, 16, 32, 32),
        data=DataSettings(held=8, portraits=48, textures=16, text=8),
        encoder=EncoderSettings(batch, attacked=3, attack_steps=1, warmup=5),
        decoder=DecoderSettings(batch, critic_width=8, warmup=5),
        models={
            name: replace(model, channels=small, text_width=64, text_layers=1, batch=8, warmup=5)
            for name, model in whole.models.items()
        },
        measure=MeasureSettings(8, attacked=2, attack_steps=2, samples=4, batch=4, sampling_steps=3),
    )
