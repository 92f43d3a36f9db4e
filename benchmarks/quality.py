"""Does `mini` draw what it is asked for? Faces, attributes and feature distances of samples, beside real renders.

    python benchmarks/quality.py IDS [--model mini] [--out benchmarks/results/quality.json] [--sheet docs/samples.png]

IDS are held-out identities (`python -m portraits identities ASSETS IDS --count 60`); their captions are the prompts.
Attributes are judged by the package's classifier, faces by dlib.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Generator, Tensor

from antidiffusion import Surrogate
from antidiffusion.card import versions
from antidiffusion.metrics.attributes import Attributes
from antidiffusion.metrics.distribution import frechet, kid
from antidiffusion.metrics.identity import DlibFaces, fdfr
from antidiffusion.models.sampling import sample
from antidiffusion.pictures.tensors import to_picture

sys.path.append(str(Path(__file__).parents[1] / "tools" / "train_mini"))

from train_attributes import PROMPTED, held_out, stated

HERE = Path(__file__).parent
COUNT, BATCH = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("identities", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "samples.png")
    args = parser.parse_args()

    surrogate, network, faces = Surrogate.from_pretrained(args.model), Attributes.load(), DlibFaces()
    renders, truth, captions = held_out(args.identities)
    drawing = {"guidance": args.guidance, "steps": args.steps}
    chosen = torch.linspace(0, len(renders) - 1, COUNT).long().tolist()  # every identity
    prompts = [captions[index] for index in chosen]
    drawn = [
        sample(prompts[first : first + BATCH], surrogate, Generator().manual_seed(first), **drawing)
        for first in range(0, COUNT, BATCH)
    ]
    samples, same = torch.cat(drawn), renders[chosen]
    with torch.no_grad():
        decoded = torch.cat([surrogate.decode(surrogate.posterior(x).mean) for x in same.split(BATCH)])

    said = network.classify(samples)
    asked = [stated(prompt) for prompt in prompts]
    hits: dict[str, list[bool]] = {name: [] for name in PROMPTED}
    for wanted, seen in zip(asked, said, strict=True):
        for name, value in wanted.items():
            hits[name].append(seen[name] == value)
    right: dict[str, list[bool]] = {name: [] for name in PROMPTED}  # the classifier's own errors on these pictures
    for index, seen in zip(chosen, network.classify(same), strict=True):
        for name in PROMPTED:
            right[name].append(seen[name] == truth[index][name])
    with torch.no_grad():
        features = network.features(torch.cat([renders, samples, decoded]))
    own = features[: len(renders)]
    features = (features - own.mean(0)) / own.std(0).clamp(min=1e-3)  # so that no single feature is the whole distance
    real, drawn_features, decoded_features = features.split([len(renders), COUNT, COUNT])
    others = torch.ones(len(renders), dtype=torch.bool)
    others[chosen] = False

    def distances(a: Tensor, b: Tensor) -> dict[str, float]:
        return {"kid": kid(a, b), "frechet": frechet(a, b)}

    result = {
        "model_sha256": surrogate.sha256,
        "versions": versions(),
        "prompts": COUNT,
        **drawing,
        "faces_found": {
            name: 1 - fdfr(faces.embed(x))
            for name, x in {"samples": samples, "renders": same, "reconstructions": decoded}.items()
        },
        "attribute_accuracy": {name: statistics.mean(values) for name, values in hits.items()},
        "attribute_accuracy_all": statistics.mean(hit for values in hits.values() for hit in values),
        "classifier_on_the_renders": {name: statistics.mean(values) for name, values in right.items()},
        "distance_to_other_renders": {
            "samples": distances(drawn_features, real[others]),
            "renders": distances(real[chosen], real[others]),
            "reconstructions": distances(decoded_features, real[others]),
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [torch.cat(list(row), 2) for row in samples[:32].split(8)]
    to_picture(torch.cat(rows, 1)[None]).write(args.sheet, overwrite=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
