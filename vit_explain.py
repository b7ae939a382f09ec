"""Show where a fine-tuned Vision Transformer looks, as a picture beside each image's prediction.

`python vit_explain.py --model ./output_model IMAGE_OR_FOLDER ...`

Each PNG has the image as the model sees it, attention rollout, and the attention of each head of the last
layer. Attention is where information is taken from; it does not prove what decided the class.
"""

import argparse
import sys
from pathlib import Path

from vit.console import exit_with_errors, printable, silence_libraries

silence_libraries()

from vit.versions import version_problems


def parse(argv=None) -> argparse.Namespace:
    if problems := version_problems():
        exit_with_errors(*problems)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, and folders searched for them")
    add("--model", default="./output_model", help="folder of a run, or another ViT that transformers opens")
    add("--output", type=Path, default=Path("attention"), help="folder of the pictures (default: attention)")
    return parser.parse_args(argv)


def free_name(folder: Path, image: Path) -> Path:
    """A file name for the picture of ``image`` that is not there yet."""
    names = (f"{image.stem}{number and f'_{number}' or ''}.png" for number in range(10**9))
    return next(folder / name for name in names if not (folder / name).exists())


def main(argv=None) -> int:
    args = parse(argv)

    from vit.classify import Classifier, named_images
    from vit.data.dataset import DataError
    from vit.explain import draw, explain

    images = [found.path for found in named_images(args.images)]
    if not images:
        exit_with_errors(f"no images under {', '.join(args.images)}")
    try:
        classifier = Classifier(args.model)
        args.output.mkdir(parents=True, exist_ok=True)
    except DataError as error:
        exit_with_errors(f"--model {args.model}: {error}")
    except OSError as error:
        exit_with_errors(f"--output {args.output}: cannot be made ({error.strerror})")
    bad = 0
    for image in images:
        try:
            found = explain(classifier, image)
        except Exception as error:  # PIL raises many types for a damaged file
            bad += 1
            print(printable(f"{image}: cannot be explained: {' '.join(str(error).split())}"), file=sys.stderr)
            continue
        picture = free_name(args.output, image)
        draw(found, picture)
        print(printable(f"{image}  {found.label} {found.probability:.3f}  {picture}"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
