"""The words of `rmoe export` and `rmoe attach`. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rmoe.engine.terminal import keep_warnings, say
from rmoe.errors import UserError, printable
from rmoe.inference.command import add_run, import_modules
from rmoe.inference.printing import tell


def add_export(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe export`."""
    text = (
        "Writes a finished run to be shared, into a new folder: all of it in Hugging Face's layout, with a model card; "
        "or only what its training changed, as an adapter of its core; or a dense backbone as timm reads it."
    )
    parser = groups.add_parser("export", help="write a finished run to be shared", description=text)
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--trained-only", action="store_true", help="only what differs from the core; rmoe attach puts them together"
    )
    kinds.add_argument("--timm", action="store_true", help="a dense backbone, for timm.create_model('local-dir:DIR')")
    parser.add_argument(
        "--core", metavar="CORE", help="of --trained-only: the run's core (default: as its config says)"
    )
    parser.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0 (default: unknown)")
    parser.add_argument("--shard-size", metavar="SIZE", help="of the largest file, such as 500MB (default: 5GB)")
    parser.set_defaults(run=_export)


def add_attach(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe attach`."""
    text = "Writes a core and an adapter of it as one model into a new folder, for rmoe predict, rmoe.load and others."
    parser = groups.add_parser("attach", help="put a core and an adapter together", description=text)
    parser.add_argument("core", metavar="CORE", help="file, folder or hf-hub:ORG/NAME that the run was made from")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter.safetensors, or its folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.set_defaults(run=_attach)


def _export(arguments: argparse.Namespace) -> None:
    keep_warnings()
    import_modules(arguments.modules)
    whole = not (arguments.trained_only or arguments.timm)
    for name, fits in (("core", arguments.trained_only), ("license", not arguments.timm), ("shard_size", whole)):
        if getattr(arguments, name) is not None and not fits:
            raise UserError(f"--{name.replace('_', '-')} does not go with this kind of export; leave it out")
    say(f"loading {printable(arguments.folder)}")
    if arguments.trained_only:
        from rmoe.inference.adapters import export_adapter

        words = {"task": arguments.task, "core": arguments.core, "license": arguments.license}
        tell(str(export_adapter(arguments.folder, arguments.out, **words)))
        return
    from rmoe.inference.load import load
    from rmoe.inference.pretrained import save_pretrained, save_timm

    run = load(arguments.folder, task=arguments.task, device="cpu")
    if arguments.timm:
        save_timm(run, arguments.out)
        tell(f"{arguments.out}: written; timm.create_model('local-dir:{arguments.out}', pretrained=True) loads it")
        return
    save_pretrained(run, arguments.out, shard_size=arguments.shard_size or "5GB", license=arguments.license)
    tell(f"{arguments.out}: written; rmoe.from_pretrained('{arguments.out}') loads it")


def _attach(arguments: argparse.Namespace) -> None:
    keep_warnings()
    from rmoe.inference.adapters import attach

    out = attach(arguments.core, arguments.adapter, arguments.out)
    tell(f"{out}: written; rmoe predict {out} and rmoe.load read it")
