"""The command `vision-attn`: compare, generate, bench, compose-bench, simulate, tune, operators, backends, verify.

Commands are thin: they read what the user typed, call the library and print. Everything heavy is imported inside them,
so that `vision-attn --help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vision_attn.command_bench import GRID, HEAD_DIM, HEADS, attention_suite, backbone_suite, guidance_suite
from vision_attn.command_input import (
    DTYPES,
    import_modules,
    load,
    parse_axes,
    parse_radius,
    read_backend,
    read_device,
    read_dtype,
    read_request,
    require_writable,
    spread,
)
from vision_attn.command_process import mistake, progress, restart_with_passive_threads

_INTERRUPTED = 130  # the shell's code for Ctrl-C; some versions of typer return it, others raise Abort
_DEFAULT_OPERATORS = ["dense", "clear(radius=8)", "neighborhood(kernel_size=13)"]

# Files of this run that are complete and have begun to appear: what an interruption must not deny.
_appearing: list[Path] = []

app = typer.Typer(
    name="vision-attn",
    help="Local attention for diffusers and timm: exact windows, any device, and a picture of the difference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Option(help="shapes-flux or shapes-sd (come with the package), a pipeline's folder, or a Hub id.")
]
Prompt = Annotated[str | None, typer.Option(help="What to draw. Default: the model's own example.")]
Seed = Annotated[int, typer.Option(help="Seed of the starting latents.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="YxX", help="Image size in pixels, height x width: 256x384 is wide. Default: the model's."),
]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale. Default: the model's.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames, for a video pipeline. Default: the pipeline's.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}. Default: float32 on the CPU, bfloat16 on a GPU.")]
Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="A module or .py file that registers operators of your own; may be given again.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def compare(
    model: Model = "shapes-flux",
    prompt: Prompt = None,
    ops: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERATOR ...",
            help="Operators, as `vision-attn operators` lists them: --ops dense 'clear(radius=8)'. The stock pipeline "
            f"(dense) is always measured too. [default: {' '.join(_DEFAULT_OPERATORS)}]",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    frames: Frames = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed images per operator, taken in turns; the median counts.")
    ] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Runs of two steps per operator before those, not timed.")] = 1,
    device: Device = "",
    dtype: Dtype = "",
    out: Annotated[Path, typer.Option(help="Folder for compare.png and compare.json.")] = Path("out"),
    imports: Import = None,
    as_json: Json = False,
) -> None:
    """Draw one prompt with several attentions: a picture sheet, and time, memory and fidelity of each."""
    import_modules(imports)
    import vision_attn as va
    from vision_attn.benchmark.compare import compare as run
    from vision_attn.benchmark.compare import runs_of
    from vision_attn.benchmark.output import Write, to_json, write_all
    from vision_attn.benchmark.scoring import judge_of
    from vision_attn.benchmark.sheet import draw_sheet
    from vision_attn.benchmark.summary import comparison_table

    operators = [va.parse(text) for text in ops or _DEFAULT_OPERATORS]
    request = read_request(prompt, seed, size, steps, guidance, frames)
    picture, numbers = out / "compare.png", out / "compare.json"
    require_writable(out, picture, numbers)
    pipe, request = load(model, request, device, dtype)
    with progress(runs_of(operators, repeats=repeats, warmup=warmup, device=pipe.device), "image") as on_run:
        comparison = run(
            pipe,
            operators,
            request,
            model=model,
            repeats=repeats,
            warmup=warmup,
            judge=judge_of(request.prompt or ""),
            on_run=on_run,
        )
    content = to_json(comparison.to_dict())
    writes: dict[Path, Write] = {
        picture: lambda file: draw_sheet(comparison).save(file, format="PNG"),
        numbers: lambda file: file.write(content.encode()),
    }
    write_all(writes, on_ready=_appearing.extend)
    typer.echo(content if as_json else comparison_table(comparison), nl=not as_json)
    typer.echo(f"\nThe picture: {picture}", err=as_json)


@app.command()
def generate(
    model: Model = "shapes-flux",
    prompt: Prompt = None,
    op: Annotated[str, typer.Option(help="The attention operator; `vision-attn operators` lists them.")] = "dense",
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB ...", help="Only attention layers with such a name, e.g. 'transformer_blocks.*'."),
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    frames: Frames = None,
    device: Device = "",
    dtype: Dtype = "",
    out: Annotated[Path, typer.Option(help="The picture; of a video an animated .gif or .webp.")] = Path(
        "out/image.png"
    ),
    imports: Import = None,
) -> None:
    """Draw one image with one attention operator."""
    import_modules(imports)
    import vision_attn as va
    from vision_attn.benchmark.generation import draws_video
    from vision_attn.benchmark.generation import generate as run
    from vision_attn.benchmark.output import picture_format, write_picture

    operator = va.parse(op)
    picture_format(out)
    require_writable(out, out)
    request = read_request(prompt, seed, size, steps, guidance, frames)
    pipe, request = load(model, request, device, dtype)
    picture_format(out, video=draws_video(pipe))
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    with va.patch(pipe, operator, layers=layers):
        image = run(pipe, request)
    typer.echo(f"The picture: {write_picture(out, image, on_ready=_appearing.extend)}")


@app.command()
def verify(model: Model = "shapes-flux", device: Device = "", dtype: Dtype = "", as_json: Json = False) -> None:
    """Check on dry runs that a model's attention can be swapped exactly; exit code 1 if a check fails."""
    import vision_attn as va
    from vision_attn.benchmark.output import to_json
    from vision_attn.pipelines.loading import load_pipeline

    place = read_device(device)
    pipe = load_pipeline(model, device=place, dtype=read_dtype(dtype, place))
    try:
        report = va.verify(pipe)
    except va.PatchError as error:
        if "must pass every check" not in str(error):
            raise
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(to_json({"passed": report.passed, "checks": [asdict(check) for check in report.checks]}), nl=False)
    else:
        typer.echo(str(report))


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="attention: one call. backbones: a ViT-S at 224, 448 and 896 px. guidance: the gradient of attention "
            "maps of a UNet like SD 1.5's at 512 px, 4 GB."
        ),
    ] = "attention",
    ops: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERATOR ...",
            help="clear(radius=R) or neighborhood(kernel_size=K). [default: the three standard cases, the growth from "
            "64x64 to 128x128 tokens and the memory at 192x192]; with --suite backbones any [default: agent, "
            "neighborhood(kernel_size=7)]",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="YxX",
            help=f"Token grid for --ops, rows x columns. [default: {GRID}]",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = HEADS,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels per head.")] = HEAD_DIM,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before, not timed.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
    flex: Annotated[
        bool, typer.Option(help="Compiled FlexAttention as a rival; needs a C++ compiler on the CPU.")
    ] = True,
    backend: Annotated[str, typer.Option(help="Ours: auto, or one of `vision-attn backends`.")] = "auto",
    device: Device = "",
    dtype: Dtype = "",
    as_json: Json = False,
) -> None:
    """Time one attention call against its rivals, after checking every result; or backbones with other attention.

    Rivals are dense SDPA (on a GPU also cuDNN's and flash by name), compiled FlexAttention, and NATTEN if installed.
    """
    import torch

    from vision_attn.benchmark.output import to_json

    if threads is not None:
        torch.set_num_threads(threads)
    place = read_device(device)
    options = {"repeats": repeats, "warmup": warmup, "device": place, "dtype": read_dtype(dtype, place)}
    given = {"--grid": grid is not None, "--heads": heads != HEADS, "--head-dim": head_dim != HEAD_DIM}
    given |= {"--no-flex": not flex, "--backend": backend != "auto"}
    own = [name for name, is_given in given.items() if is_given]
    if suite == "backbones":
        run = backbone_suite(ops, own, options)
    elif suite == "guidance":
        run = guidance_suite(["--ops"] * bool(ops) + own, options)
    elif suite == "attention":
        run = attention_suite(ops, grid, heads, head_dim, {**options, "flex": flex, "backend": read_backend(backend)})
    else:
        raise ValueError(f"--suite must be attention, backbones or guidance, got {suite!r}")
    with progress(None, "run") as on_run:
        report = run(on_run=on_run)
    typer.echo(to_json(report.to_dict()) if as_json else str(report), nl=not as_json)


@app.command()
def compose_bench(
    model: Annotated[str, typer.Option(help="shapes-sd (comes with the package), or a folder of one like it.")] = (
        "shapes-sd"
    ),
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD ...",
            help="plain (always), structured-paper, structured-covering, structured-replace, structured-conjunction, "
            "a-star, attend-and-excite, structured+a-star. [default: all]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Captions: hard (new pairs and three objects), new pair, three, two, one.")
    ] = "hard",
    captions: Annotated[
        int | None, typer.Option(min=1, help="Captions of the split. Default: 150, or all there are.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per caption.")] = 2,
    steps: Steps = None,
    guidance: Guidance = None,
    tuning: Annotated[
        bool,
        typer.Option("--tuning", help="Other captions, for choosing settings; some have the objects in another order."),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
    device: Device = "",
    dtype: Dtype = "",
    out: Annotated[Path, typer.Option(help="Folder for compose.png and compose.json.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Draw captions with compositional guidance and without, and let a detector judge: accuracy with intervals."""
    import torch

    from vision_attn.benchmark.compose_bench import compose_bench as run
    from vision_attn.benchmark.compose_methods import METHODS
    from vision_attn.benchmark.compose_sheet import draw_composition_sheet
    from vision_attn.benchmark.output import Write, to_json, write_all
    from vision_attn.command_bench import compose_task

    if threads is not None:
        torch.set_num_threads(threads)
    picture, numbers = out / "compose.png", out / "compose.json"
    require_writable(out, picture, numbers)
    drawn, task, about = compose_task(
        model, methods or METHODS, split, captions, seeds, tuning, read_request(None, 0, None, steps, guidance, None),
        device, dtype,
    )  # fmt: skip
    with progress(task.calls * len(drawn), "call") as on_run:
        report = run(drawn, task, about=about, on_run=on_run)
    content = to_json(report.to_dict())
    writes: dict[Path, Write] = {
        picture: lambda file: draw_composition_sheet(report).save(file, format="PNG"),
        numbers: lambda file: file.write(content.encode()),
    }
    write_all(writes, on_ready=_appearing.extend)
    typer.echo(content if as_json else str(report), nl=not as_json)
    typer.echo(f"\nThe picture: {picture}", err=as_json)


@app.command()
def simulate(
    grid: Annotated[str, typer.Option(metavar="YxX", help="Token grid: X, YxX or TxYxX.")],
    kernel_size: Annotated[
        str | None, typer.Option(metavar="YxX", help="Window per axis, or one number for all.", show_default=False)
    ] = None,
    radius: Annotated[
        str | None, typer.Option(metavar="R", help="CLEAR's circle instead: one radius, or one per axis.")
    ] = None,
    stride: Annotated[str, typer.Option(metavar="YxX", help="Queries that share a window.")] = "1",
    dilation: Annotated[str, typer.Option(metavar="YxX", help="Step between the keys of a window.")] = "1",
    q_tile: Annotated[
        str | None, typer.Option(metavar="YxX", help="Queries per tile. [default: the kernels', 128 tokens]")
    ] = None,
    kv_tile: Annotated[
        str | None, typer.Option(metavar="YxX", help="Keys per tile. [default: the kernels', 64 tokens]")
    ] = None,
    is_causal: Annotated[bool, typer.Option(help="Hide later keys on every axis.")] = False,
    dynamic_kv: Annotated[bool, typer.Option(help="Key tiles begin where a window does, not on a raster.")] = False,
    fraction: Annotated[
        float | None, typer.Option(help="Share of a model's time in this attention: adds its whole speed-up.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps, with --fraction.")] = 1,
    dense_steps: Annotated[int, typer.Option(help="Those that keep dense attention, with --fraction.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="A picture of the speed-up against stride and tile.")] = None,
    as_json: Json = False,
) -> None:
    """Count the key tiles a window visits, and the speed-up they allow on tiled hardware."""
    from vision_attn.benchmark.output import picture_format, to_json, write_picture
    from vision_attn.benchmark.simulation import default_tiles, draw_curves
    from vision_attn.operators.neighborhood import checked_box
    from vision_attn.simulator import end_to_end
    from vision_attn.simulator import simulate as count

    if fraction is None and (steps, dense_steps) != (1, 0):
        raise ValueError("--fraction must come with --steps and --dense-steps: the share of the time that is attention")
    tokens = parse_axes(grid, "--grid")
    axes = (tokens,) if isinstance(tokens, int) else tokens
    window: dict[str, Any] = {
        "kernel_size": None if kernel_size is None else parse_axes(kernel_size, "--kernel-size"),
        "stride": parse_axes(stride, "--stride"),
        "dilation": parse_axes(dilation, "--dilation"),
        "is_causal": is_causal,
    }
    tiles: dict[str, Any] = {
        name: default if typed is None else parse_axes(typed, f"--{name.replace('_', '-')}")
        for name, typed, default in zip(("q_tile", "kv_tile"), (q_tile, kv_tile), default_tiles(axes), strict=True)
    }
    result = count(
        axes, **window, **tiles, dynamic_kv=dynamic_kv, radius=None if radius is None else parse_radius(radius)
    )
    numbers = {"grid": axes, **window, "radius": radius, **tiles} | result.to_dict()
    if fraction is not None:
        numbers["end_to_end"] = end_to_end(fraction, result.speedup, steps, dense_steps)
    if plot is not None:
        if kernel_size is None:
            raise ValueError("--plot must come with --kernel-size: a circle has no stride to draw")
        picture_format(plot)
        require_writable(plot, plot)
        write_picture(plot, draw_curves(checked_box("simulate", axes, **window)), on_ready=_appearing.extend)
    if as_json:
        typer.echo(to_json(numbers), nl=False)
        return
    typer.echo(str(result))
    if fraction is not None:
        typer.echo(f"speed-up of it all  {numbers['end_to_end']:.2f}x (attention is {fraction:.1%} of the time)")
    if plot is not None:
        typer.echo(f"\nThe picture: {plot}")


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="The table to write, a .json file.")] = Path("launch_configs.json"),
    kernels: Annotated[
        list[str] | None, typer.Option(metavar="KERNEL ...", help="Kernels. [default: all windowed ones]")
    ] = None,
    head_dims: Annotated[
        list[int] | None, typer.Option(metavar="D ...", help="Channels per head. [default: 64 128]")
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option(metavar="DTYPE ...", help=f"{', '.join(DTYPES)}. [default: bfloat16]")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per axis of a window; rows serve windows up to it. [default: 33, all]")
    ] = None,
) -> None:
    """Find the fastest tile sizes of the Triton kernels on this GPU, and write them for the kernels to read."""
    from vision_attn.benchmark.output import write_all
    from vision_attn.kernels import tune as tuning

    chosen, types = kernels or tuning.KERNELS, dtypes or ["bfloat16"]
    widths = head_dims or [64, 128]
    tuning.require(chosen, types, widths, window)
    require_writable(out, out)
    with progress(None, "launch") as on_run:
        table = tuning.tune(chosen, widths, types, window=window, on_run=on_run)
    content = tuning.to_json(table).encode()
    write_all({out: lambda file: file.write(content)}, on_ready=_appearing.extend)
    typer.echo(f"The table: {out}. The kernels read it where VISION_ATTN_LAUNCH_CONFIGS={out.absolute()}")


@app.command()
def operators(imports: Import = None, as_json: Json = False) -> None:
    """List the attention operators and how to write them."""
    import_modules(imports)
    from vision_attn.benchmark.listing import operator_rows
    from vision_attn.benchmark.output import table, to_json

    rows = operator_rows()
    if as_json:
        typer.echo(to_json(rows), nl=False)
    else:
        typer.echo(table(["operator", "what it does"], [[row["form"], row["summary"]] for row in rows]))


@app.command()
def backends(as_json: Json = False) -> None:
    """List the backends: which can be used here, and why others cannot."""
    from vision_attn.benchmark.listing import backend_rows
    from vision_attn.benchmark.output import table, to_json

    rows = backend_rows()
    if as_json:
        typer.echo(to_json(rows), nl=False)
    else:
        cells = [[row["name"], "yes" if row["available"] else "no", row["reason"]] for row in rows]
        typer.echo(table(["backend", "usable here", "why"], cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with 0, 1 (a check failed), 2 (a user's mistake) or 130 (Ctrl-C).

    Args:
        arguments: What follows the program's name; None takes them from the process.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    _appearing.clear()
    if arguments is None and typed[:1] in (["bench"], ["compare"], ["compose-bench"]):
        restart_with_passive_threads()
    try:
        code = app(spread(typed or ["--help"]), prog_name="vision-attn", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        message = mistake(error)
        if os.environ.get("VISION_ATTN_TRACEBACK") or message is None:
            raise
        typer.echo(f"vision-attn: {' '.join(message.split())}", err=True)
        code = 2
    if code == _INTERRUPTED:
        files = ", ".join(map(str, _appearing))
        done = f"each of {files} is whole or as it was before" if files else "nothing was written"
        typer.echo(f"vision-attn: interrupted, {done}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
