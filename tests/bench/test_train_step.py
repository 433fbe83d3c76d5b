"""The step of the distillation as a benchmark: the command on one process and on two, and the arithmetic of its records."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fvgen.bench.train_figures import check_single, step_records
from fvgen.bench.train_profile import GROUPS, OTHER, group_of, profile_text, summarise
from fvgen.bench.train_step import Measured, RandomClips, StepOptions, make_parts, make_trainer
from fvgen.distill.parallel import Parallel
from fvgen.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("bench", "train", "--model", "viewcrafter_512", "--quick", "--device", "cpu")
ALONE = Parallel(0, 1, torch.device("cpu"))
FOUR = Parallel(1, 4, torch.device("cpu"), mesh="four")
OPTIONS = StepOptions("viewcrafter_512")


def records_of(path: Path) -> dict[str, dict]:
    return {r["name"]: r for r in json.loads(path.read_text())}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages and the reference on one process."""
    from fvgen.cli import main

    folder = tmp_path_factory.mktemp("one")
    files = ("--profile", str(folder / "deep" / "p.md"), "--json", str(folder / "one.json"))
    assert main([*QUICK, *files]) == 0
    return folder / "one.json"


@pytest.mark.slow
def test_one_process(single: Path) -> None:
    found = records_of(single)
    for stage in (1, 2):
        step, rate = found[f"train_stage{stage}_step_512_ms"], found[f"train_stage{stage}_samples_per_s_512"]
        critic, student = (found[f"train_stage{stage}_{kind}_update_512_ms"] for kind in ("critic", "student"))
        assert (step["count"], critic["count"], student["count"], step["clips_per_step"]) == (1, 5, 1, 6)
        assert 5 * critic["min_ms"] + student["median_ms"] <= step["median_ms"]
        assert rate["value"] == pytest.approx(6000 / step["median_ms"])
        assert step["stage"] == stage
        assert (step["gpus"], step["checkpointing"], step["guidance_scale"], step["repeatable"]) == (1, True, 7.5, True)
    plain, step = found["train_stage2_step_reference_512_ms"], found["train_stage2_step_512_ms"]
    assert (plain["kernels"], step["kernels"]) == ("reference", "strict")
    assert found["train_stage2_speedup_vs_reference"]["value"] == pytest.approx(plain["median_ms"] / step["median_ms"])
    hours = (4000 * found["train_stage1_step_512_ms"]["median_ms"] + 5000 * step["median_ms"]) / 3.6e6
    estimate = found["train_estimate_8gpu_hours_512_from_x1"]
    assert estimate["value"] == pytest.approx(hours)
    assert "an estimate: 4000 + 5000 steps" in estimate["assumes"]
    assert not any(name.startswith(("train_scaling", "train_peak")) for name in found)  # one process, and no GPU
    command = "fvgen bench train --quick --profile p.md --model viewcrafter_512 --device cpu --json RESULT.json"
    assert {r["command"] for r in found.values()} == {command}
    text = (single.parent / "deep" / "p.md").read_text()
    assert "| matrix products |" in text
    assert "for want of a GPU" in text


@pytest.mark.slow
def test_two_processes_share_the_networks(single: Path, tmp_path: Path) -> None:
    words = ("--stage", "1", "--shard", "--single", str(single), "--json", str(tmp_path / "two.json"))
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fvgen.cli")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *QUICK, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    found = records_of(tmp_path / "two.json")
    step, before = found["train_stage1_step_512_x2_ms"], records_of(single)["train_stage1_step_512_ms"]
    assert (step["gpus"], step["layout"], step["batch"], step["clips_per_step"]) == (2, "shard", 2, 12)
    assert found["train_scaling_x2"]["value"] == pytest.approx(100 * before["median_ms"] / step["median_ms"])
    assert step["command"].startswith("torchrun --nproc-per-node 2 -m fvgen.cli bench train --quick --shard")
    assert str(tmp_path) not in (tmp_path / "two.json").read_text()
    assert done.stdout.count("train_stage1_step_512_x2_ms") == 1  # the first process speaks for all
    assert done.stderr.count("building the networks") == 1
    assert not any("stage2" in name or "estimate" in name for name in found)


def measured(scale: float = 1.0, peak: int | None = None) -> Measured:
    """Two iterations of two critic updates."""
    critic, student = [10.0, 20.0, 10.0, 20.0], [70.0, 90.0]
    rows = [scale * x for x in (100.0, 120.0)]
    return Measured([scale * x for x in critic], [scale * x for x in student], rows, "cuda events", peak, peak, {}, None)


def test_figures_of_four_gpus() -> None:
    alone = step_records(OPTIONS, ALONE, {1: measured(1.0, 10**9), 2: measured(2.0, 3 * 10**9)}, measured(6.0))
    by_name = {r["name"]: r for r in alone}
    assert by_name["train_stage2_speedup_vs_reference"]["value"] == pytest.approx(3.0)
    assert by_name["train_peak_gb_x1"]["value"] == 3.0
    four = {r["name"]: r for r in step_records(OPTIONS, FOUR, {1: measured(1.25, 1), 2: measured(2.2, 2)}, None, alone)}
    assert four["train_scaling_x4"]["value"] == pytest.approx(80.0)
    assert four["train_scaling_x4"]["stage2_percent"] == pytest.approx(100 / 1.1)
    assert four["train_stage1_samples_per_s_512_x4"]["value"] == pytest.approx(3 * 4 * 1000 / (1.25 * 110))
    assert four["train_stage1_step_512_x4_ms"]["median_ms"] == pytest.approx(1.25 * 110)
    replicated = step_records(OPTIONS, replace(FOUR, mesh=None), {1: measured(1.0, 5)}, None)
    assert {"train_stage1_step_512_x4_replicated_ms", "train_peak_gb_x4_replicated"} <= {r["name"] for r in replicated}
    large = step_records(replace(OPTIONS, model="viewcrafter_1024"), ALONE, {1: measured(1.0, 5)}, None)
    assert "train_peak_gb_1024_x1" in {r["name"] for r in large}


def test_scaling_needs_the_same_measurement_on_one_gpu() -> None:
    alone = step_records(OPTIONS, ALONE, {1: measured(), 2: measured()}, None)
    check_single(alone, OPTIONS)
    with pytest.raises(UserError, match="another checkpointing"):
        check_single(alone, replace(OPTIONS, checkpointing=False))
    with pytest.raises(UserError, match="another frames, image_size"):
        check_single(alone, replace(OPTIONS, quick=True))
    with pytest.raises(UserError, match="holds no train_stage2_step_512_ms"):
        check_single(alone[:2], OPTIONS)
    four = step_records(OPTIONS, FOUR, {1: measured(), 2: measured()}, None)
    with pytest.raises(UserError, match="holds no train_stage1"):
        check_single([{**r, "name": r["name"].replace("_x4", "")} for r in four], OPTIONS)


def test_nothing_is_zero() -> None:
    """Products with zeros would need less power and run at higher clocks."""
    spec, settings = make_parts(StepOptions("viewcrafter_512", quick=True), 1)
    trainer = make_trainer(2, spec, settings, ALONE)
    assert list(trainer.roles.trained) == ["student", "fake", "head"]
    for name in ("student", "fake"):
        assert all(bool(p.any()) for p in trainer.roles.trained[name].parameters())
    batch = RandomClips(spec, ALONE.device).read([3, 0])
    tensors = (batch.clean, batch.condition.latents, batch.condition.context, batch.condition.uncond_context)
    assert all(0.9 < float(x.std()) < 1.1 for x in tensors)
    assert batch.clean.shape == (2, 8, 4, 4, 8)
    assert batch.condition.context.shape == (2, 77 + 16 * 4, 64)
    trainer.close()


def test_profile_of_overlapping_kernels() -> None:
    """Two kernels side by side keep the GPU busy once; in between it waits."""
    found = summarise(
        [("nvjet_a", 0.0, 100.0), ("ncclKernel", 50.0, 200.0), ("geglu_kernel", 300.0, 400.0), ("nvjet_a", 60.0, 70.0)]
    )
    assert (found.span_ms, found.busy_ms, found.busy_percent) == pytest.approx((0.4, 0.3, 75.0))
    assert found.kernels["nvjet_a"] == (pytest.approx(0.11), 2)
    assert found.groups() == pytest.approx({"communication": 15 / 0.36, "matrix products": 11 / 0.36, "fvgen: GEGLU": 10 / 0.36})
    text = profile_text(found, "two updates", most=2)
    assert "(75.0 %)" in text
    assert [line.split("`")[1] for line in text.splitlines() if "`" in line] == ["ncclKernel", "nvjet_a"]


# operators of the samplers, of the geometry and of the inference engine
OTHERS = ("diffusion_step", "point_map_distance", "image_conv", "padded_sum", "row_softmax")


def test_own_kernels_have_groups_of_their_own() -> None:
    """Read from the sources, so that a new kernel of the training step is not counted as PyTorch's."""
    kernels = []
    for path in sorted((ROOT / "kernels").glob("*/triton.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if path.parent.name not in OTHERS:
            kernels += [f.name for f in functions if f.name.endswith("_kernel")]
    assert len(kernels) > 15
    assert [k for k in kernels if not group_of(k).startswith("fvgen: ")] == []


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_nn_align8>(Params)", "matrix products"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention over pixels"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            "optimiser, clipping, average",
        ),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "elementwise, sums"),
        ("Memcpy HtoD (Pageable -> Device)", "copies and casts"),
        ("something_new", OTHER),
    ],
)
def test_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group
    assert group == OTHER or group in dict(GROUPS)
