"""One local page: drop a file, pick classes or an example, hear and see mixture, stems and residual."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.demo.work import MAX_SECONDS, Sound, separate_file
from pipeline.separate import Separator, Unusable
from pipeline.separate.command import chosen_model, interruptible, return_freed_memory

HOST = "127.0.0.1"  # nobody else is to reach it
MAX_UPLOAD = "200mb"
MAX_STEMS = 8
KEPT_SECONDS = 1800  # that the page's own copies of files live


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted; 0: it was, 2: it could not be, and why is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pipeline demo", description=__doc__)
    parser.add_argument("-n", "--name", help="a model of data/separators or data/mixit, or a folder")
    parser.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default %(default)s)")
    args = parser.parse_args(arguments)
    return_freed_memory()
    try:
        with interruptible(), tempfile.TemporaryDirectory(prefix="separate-demo-") as folder:
            gradio = _gradio(Path(folder))
            separator = Separator.from_pretrained(chosen_model(args.name))
            serve(page(gradio, separator, Path(folder)), args.port)
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


def _gradio(folder: Path) -> Any:
    """Import gradio, which then keeps its copies of files in `folder` and tells nobody that it runs."""
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "copies"), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import gradio
    except ImportError as error:
        raise Unusable("gradio is not installed: pip install 'gradio>=6,<7'") from error
    return gradio


def serve(blocks: Any, port: int) -> None:
    """Serve the page on this machine alone."""
    blocks.launch(
        server_name=HOST, server_port=port, share=False, max_file_size=MAX_UPLOAD, footer_links=[], show_error=True
    )


def page(gradio: Any, separator: Separator, folder: Path) -> Any:
    """Build the page. What it writes lies in `folder`, and is removed when the next file comes."""
    names = [one.name for one in separator.classes] if separator.takes_queries else []

    def work(file: str | None, classes: list[str], example: str | None, auto: bool) -> list[Any]:
        shutil.rmtree(folder / "run", ignore_errors=True)
        try:
            if not file:
                raise Unusable("no file: drop one first")
            if len(classes) > MAX_STEMS:
                raise Unusable(f"at most {MAX_STEMS} classes at once")
            given = Path(example) if example else None
            sounds = separate_file(separator, Path(file), folder / "run", classes=classes, example=given, auto=auto)
        except (Unusable, OSError) as error:
            said = str(error).replace(str(file), Path(file or "").name)  # not where the page keeps its copy
            raise gradio.Error(said, print_exception=False) from error
        return shown(gradio, sounds)

    with gradio.Blocks(title="separate", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        gradio.Markdown(
            f"# {separator.folder.stem}\nA file of up to {MAX_SECONDS / 60:g} minutes, and what to find in it."
        )
        with gradio.Row():
            file = gradio.File(label="recording", type="filepath")
            with gradio.Column(visible=bool(names)):
                classes = gradio.Dropdown(names, multiselect=True, value=[], label="classes")
                auto = gradio.Checkbox(label="what the detector finds")
                example = gradio.File(label="or an example of the sound", type="filepath")
        button = gradio.Button("separate", variant="primary")
        slots = []
        for _ in range(MAX_STEMS + 3):  # the mixture, an example's stem and the residual besides
            with gradio.Row():
                slots += [gradio.Audio(visible=False, type="filepath"), gradio.Image(visible=False, type="filepath")]
        inputs = [file, classes, example, auto]
        button.click(work, inputs, slots, api_name="separate", concurrency_limit=1)
    return blocks


def shown(gradio: Any, sounds: Sequence[Sound]) -> list[Any]:
    """Fill a slot, of player and picture, with each sound, and hide the rest."""
    slots = MAX_STEMS + 3
    made: list[Any] = []
    for one in sounds[:slots]:
        made.append(gradio.Audio(str(one.audio), label=one.name, visible=True))
        made.append(gradio.Image(str(one.picture), label=one.name, visible=True))
    hidden = [gradio.Audio(visible=False), gradio.Image(visible=False)]
    return made + hidden * (slots - len(made) // 2)


if __name__ == "__main__":
    sys.exit(main())
