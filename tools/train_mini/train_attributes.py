"""Train the classifier of `antidiffusion.metrics.attributes` on renders; it judges samples and edits of `mini`.

    cd tools && python -m portraits train ASSETS DATA --count 12000 && python -m portraits identities ASSETS IDS
    python train_mini/train_attributes.py DATA IDS    # writes the weights, benchmarks/results/attributes.json

Its own accuracy, on held-out identities and on their reconstructions by the autoencoder, is in the results.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from antidiffusion.metrics.attributes import CLASSES, COLOURS, WEIGHTS, Attributes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PROMPTED = ("hair", "background", "glasses", "clothing", "beard")  # what samples are judged by
BEARDS = {"beard": "beard", "longbeard": "beard", "moustache": "moustache"}  # stubble hardly shows at 128 pixels


def labels(record: dict) -> dict[str, str]:
    """Return the class of every attribute of a renderer's record (in attributes.json or meta.json)."""
    hidden = record["hair_style"] == "bald" or (
        record["hat"] and record["hair_style"] in ("short", "buzz", "swept-back")
    )
    return {
        "hair": "none" if hidden else record["hair_col"],
        "background": record["bg"],
        "clothing": record["cloth_col"],
        "glasses": record["glasses"] or "none",
        "beard": BEARDS.get(record["beard"], "none"),
        "hat": record["hat"] or "none",
        "mouth": "smile" if record["expr"] in ("smiling", "laughing") else "other",
        "age": "old" if record["age"] == "old" else "other",
        "sex": record["sex"],
    }


def stated(caption: str) -> dict[str, str]:
    """Return what a caption of the renderer asks for, of `PROMPTED`: colours it names, and glasses and beard always."""
    colour = rf"({'|'.join((*COLOURS, 'blond'))})"
    found = {
        "hair": re.search(rf"{colour} (?:hair|afro|bob|buzz)", caption),
        "background": re.search(rf"{colour} (?:gradient )?background", caption),
        "clothing": re.search(rf"{colour}(?: and \w+ striped)? (?:shirt|turtleneck|v-neck)", caption),
    }
    said = {name: match[1] for name, match in found.items() if match}
    if re.search(r"\bbald\b", caption):
        said["hair"] = "none"
    said["glasses"] = next((worn for worn in ("sunglasses", "glasses") if worn in caption), "none")
    said["beard"] = next((kind for kind in ("moustache", "beard") if kind in caption), "none")
    return said


def held_out(folder: Path) -> tuple[Tensor, list[dict[str, str]], list[str]]:
    """Read the renderer's identities: pictures `(N, 3, H, W)` in [0, 1], their labels and captions."""
    pictures, truth, captions = [], [], []
    for meta in sorted(folder.glob("id*/meta.json")):
        content = json.loads(meta.read_text())
        for image in content["images"]:
            pictures.append(np.asarray(Image.open(meta.parent / image["file"]).convert("RGB")))
            truth.append(labels(content["identity"] | image["image"]))
            captions.append(image["caption"])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, truth, captions


def accuracy(network: Attributes, x: Tensor, truth: list[dict[str, str]]) -> dict[str, float]:
    """Return the share of right answers per attribute."""
    said = [answer for batch in x.split(60) for answer in network.classify(batch)]
    return {name: float(np.mean([a[name] == b[name] for a, b in zip(said, truth, strict=True)])) for name in CLASSES}


def soften(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Flip, blur and grain a batch: samples are softer than renders."""
    if rng.random() < 0.5:
        x = x.flip(-1)
    if rng.random() < 0.6:
        scale = rng.uniform(0.35, 0.9)
        small = F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
        x = F.interpolate(small, x.shape[-2:], mode="bilinear")
    x = x + torch.randn(x.shape) * rng.uniform(0, 0.04)
    return (x * rng.uniform(0.93, 1.07)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="training pictures of tools/portraits")
    parser.add_argument("identities", type=Path, help="held-out identities of tools/portraits")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = np.load(args.data / "train.npy", mmap_mode="r")
    records = [labels(record) for record in json.loads((args.data / "attributes.json").read_text())]
    targets = {name: torch.tensor([CLASSES[name].index(r[name]) for r in records]) for name in CLASSES}
    network, total = Attributes(), args.epochs * (len(data) // args.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    begun, step = time.monotonic(), 0
    for _ in range(args.epochs):
        order = rng.permutation(len(data))
        for index in order[: len(order) // args.batch * args.batch].reshape(-1, args.batch):
            index = np.sort(index)
            x = soften(torch.from_numpy(data[index]).permute(0, 3, 1, 2).float() / 255, rng)
            loss = sum(F.cross_entropy(logits, targets[name][index]) for name, logits in network(x).items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0:
                print(f"step {step} of {total}, loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    save_file({key: value.half().contiguous() for key, value in network.state_dict().items()}, WEIGHTS)

    from antidiffusion import Surrogate

    network, mini = Attributes.load(), Surrogate.from_pretrained("mini")
    x, truth, _ = held_out(args.identities)
    with torch.no_grad():
        decoded = torch.cat([mini.decode(mini.posterior(batch).mean) for batch in x.split(20)])
    result = {"held_out_pictures": len(x), "renders": accuracy(network, x, truth)}
    result["reconstructions"] = accuracy(network, decoded, truth)
    (RESULTS / "attributes.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
