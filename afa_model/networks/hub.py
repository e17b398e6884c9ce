"""A model as the Hugging Face Hub keeps one: a folder of model.safetensors, config.json and a card.

    model.save_pretrained("folder"), model.push_to_hub("ORG/NAME"), AFA.from_pretrained("folder" or "ORG/NAME")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

# timm has imported most of it already: the mixin adds 30 ms to the second that this package takes.
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..errors import AfaError, CheckpointError, naming, reason
from ..runtime.tensor_files import read_tensors, write_tensors
from ..runtime.writing import whole
from .model_card import card_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class HubModel(
    PyTorchModelHubMixin,
    library_name="afa",
    pipeline_tag="image-segmentation",
    tags=["afa", "weakly-supervised-segmentation"],
    paper_url="https://arxiv.org/abs/2203.02664",
):
    """What lets a network be published and fetched; it is itself the network's module.

    Attributes:
        arguments: of the constructor, that make the same network again; plain data.
        class_names: K names, background first, or None where they are not known.
        about: what else is known of the weights, plain data: ``iteration``, ``scores`` (see :mod:`.model_card`), and
            the settings of the ``run`` that trained them.
    """

    arguments: dict[str, Any]
    class_names: Sequence[str] | None = None
    about: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """The model of a folder that ``save_pretrained`` wrote, or of the Hub (``ORG/NAME``), in eval mode, on the CPU
        (or ``map_location``).

        Other options are the Hub's: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            CheckpointError: there is no such folder or model, or it holds something else.
        """
        source = str(pretrained_model_name_or_path)
        path = Path(source).expanduser()
        if path.exists() or not _ON_THE_HUB.fullmatch(source):
            check_hub_folder(path)
            source = str(path)
        try:
            return super().from_pretrained(source, **options)
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
            if isinstance(error, AfaError):
                raise
            raise CheckpointError(
                f"{source}: there is no folder of this name, and the Hub did not give a model: {reason(error)}"
            ) from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Mapping[str, Any] | None = None,
        map_location: str = "cpu",
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Any:
        """The mixin calls it with what it read from config.json."""
        try:
            model = cls(**arguments)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{model_id}: its {CONFIG} does not describe an AFA: {error}") from error
        path = Path(model_id) / WEIGHTS
        if not path.is_file():
            path = Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        try:
            model.load_state_dict(read_tensors(path, device=map_location), strict=strict)
        except RuntimeError as error:
            if isinstance(error, AfaError):
                raise
            raise CheckpointError(f"{path} does not hold the weights of the model in {CONFIG}: {error}") from error
        config = config or {}
        names = config.get("class_names")
        model.class_names = None if names is None else tuple(names)
        known = {*model.arguments, "class_names"}
        model.about = {key: value for key, value in config.items() if key not in known}
        return model.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Weights and settings; the mixin writes the card after them."""
        names = None if self.class_names is None else list(self.class_names)
        if names is not None and len(names) != self.arguments["num_classes"]:
            raise ValueError(f"class_names: expected {self.arguments['num_classes']} names, got {len(names)}")
        config = {**self.arguments, "class_names": names, **self.about}
        write_tensors(save_directory / WEIGHTS, self.state_dict())
        with whole(save_directory / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """README.md; the mixin does not replace one that is there."""
        data = self._hub_mixin_info.model_card_data
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(self.arguments, self.class_names, self.about)}")


def check_hub_folder(folder: str | Path) -> Path:
    """The folder, if it is one that ``save_pretrained`` wrote.

    Raises:
        CheckpointError: saying what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not" if folder.exists() else "not found: expected"
        raise CheckpointError(f"{folder} {what} a folder that save_pretrained wrote, or ORG/NAME on the Hub")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        run = any(folder.glob("*.pt")) and "; of a training run `afa convert RUN FOLDER --to hub` makes such a folder"
        raise CheckpointError(f"{folder} holds no {' and no '.join(missing)}, as save_pretrained writes{run or ''}")
    with naming(folder / CONFIG, "model", CheckpointError):
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    lacking = [name for name in ("backbone", "num_classes") if not isinstance(content, dict) or name not in content]
    if lacking:
        raise CheckpointError(f"{folder / CONFIG} does not describe an AFA: it lacks {' and '.join(lacking)}")
    return folder


def is_hub_folder(folder: str | Path) -> bool:
    """Whether there is a model as the Hub keeps one."""
    return all((Path(folder) / name).is_file() for name in (CONFIG, WEIGHTS))
