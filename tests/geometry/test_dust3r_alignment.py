"""Alignment of many photos on made-up scenes with known cameras."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fvgen.geometry.conventions import invert_rigid, rigid
from fvgen.geometry.dust3r.alignment import AlignmentState, Objective, optimise, pose_code, pose_matrix, scene_of_state
from fvgen.geometry.dust3r.clean import cleaned_confidence
from fvgen.geometry.dust3r.pairs import PairPrediction, complete_pairs, float32_products
from fvgen.geometry.dust3r.pinhole import intrinsics, transform, unproject
from fvgen.geometry.dust3r.spanning_tree import aligned_scene, initial_state, register, spanning_tree
from fvgen.geometry.se3 import so3_exp
from fvgen.types import Cameras, ImageSet
from fvgen.utils.errors import UserError

SIZE, FOCAL = (24, 32), 30.0


def _world() -> tuple[torch.Tensor, torch.Tensor]:
    """Poses ``[3, 4, 4]``, photo 0 being the world, and exact world points ``[3, H, W, 3]``."""
    generator = torch.Generator().manual_seed(0)
    turns = so3_exp(torch.tensor([[0, 0, 0], [0.1, -0.2, 0.05], [-0.1, 0.3, 0.1]], dtype=torch.float64))
    poses = rigid(turns, torch.tensor([[0, 0, 0], [0.5, -0.1, 0.2], [-0.4, 0.2, 0.1]], dtype=torch.float64))
    depths = 3 + torch.rand(3, *SIZE, generator=generator, dtype=torch.float64)
    return poses, torch.stack([unproject(d, intrinsics(FOCAL, SIZE), pose) for d, pose in zip(depths, poses, strict=True)])


def _predictions() -> list[PairPrediction]:
    poses, points = _world()
    predictions = []
    for k, (i, j) in enumerate(complete_pairs(3)):
        back, sure = invert_rigid(poses[i]), torch.full(SIZE, 5.0 + k)
        in_first = [((1 + 0.1 * k) * transform(back, points[n])).float() for n in (i, j)]
        predictions.append(PairPrediction(i, j, in_first[0], sure, in_first[1], sure))
    return predictions


def test_registration_gives_a_similarity_back() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    R, T = so3_exp(torch.tensor([0.4, -1.0, 0.3], dtype=torch.float64)), torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    y, weights = 2.5 * x @ R.T + T, torch.rand(50, generator=generator, dtype=torch.float64)
    y[:5], weights[:5] = 100.0, 0.0
    scale, rotation, translation = register(x, y, weights)
    assert scale == pytest.approx(2.5)
    torch.testing.assert_close(rotation, R)
    torch.testing.assert_close(translation, T)
    mirrored = register(x, x * torch.tensor([-1.0, 1.0, 1.0]), torch.ones(50))
    assert torch.linalg.det(mirrored[1]) == pytest.approx(1.0)


def test_the_tree_takes_the_best_pairs_first() -> None:
    assert [(p.first, p.second) for p in spanning_tree(_predictions(), 3)] == [(1, 2), (0, 2)]


def test_exact_pairs_give_the_cameras_back() -> None:
    poses, points = _world()
    scene = aligned_scene(ImageSet(torch.zeros(3, 3, *SIZE)), _predictions(), steps=0)
    torch.testing.assert_close(scene.cameras.K[:, 0, 0], torch.full((3,), FOCAL), rtol=1e-5, atol=0.0)
    first, found = invert_rigid(scene.cameras.world_from_cam[0].double()), scene.cameras.world_from_cam.double()
    relative = first @ found
    scale = relative[1, :3, 3].norm() / poses[1, :3, 3].norm()
    assert 0.3 < scale < 0.7
    expected = poses.clone()
    expected[:, :3, 3] *= scale
    torch.testing.assert_close(relative, expected, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(transform(first, scene.points.double()), scale * points, rtol=0.0, atol=1e-3)


def test_pairs_that_do_not_suffice_are_refused() -> None:
    predictions = _predictions()
    with pytest.raises(UserError, match="do not connect all 4 photos"):
        spanning_tree(predictions, 4)
    doubted = [
        replace(p, confidence_first=p.confidence_first / 9, confidence_second=p.confidence_second / 9) for p in predictions
    ]
    with pytest.raises(UserError, match="no focal length of photo 1 was found"):
        initial_state(doubted[:3], 3)


def test_a_photo_that_is_first_in_no_pair() -> None:
    """Its focal length is found to the ratio of those that are tried, which is 1.094."""
    size, focal = (96, 128), 100.0
    generator = torch.Generator().manual_seed(0)
    poses, _ = _world()
    depths = 1 + 3 * torch.rand(3, *size, generator=generator, dtype=torch.float64)
    points = [unproject(d, intrinsics(focal, size), pose) for d, pose in zip(depths, poses, strict=True)]
    sure = torch.full(size, 9.0)
    predictions = []
    for i, j in ((1, 0), (2, 0), (1, 2), (2, 1)):
        in_first = [transform(invert_rigid(poses[i]), points[n]).float() for n in (i, j)]
        predictions.append(PairPrediction(i, j, in_first[0], sure, in_first[1], sure))
    state = initial_state(predictions, 3)
    found = (state.focals / 20).exp()
    torch.testing.assert_close(found[1:], torch.full((2,), focal), rtol=1e-4, atol=0.0)
    assert focal / 1.1 < found[0] < focal * 1.1
    world = pose_matrix(state.poses).double()
    angle = so3_angle_deg((invert_rigid(world[1]) @ world[0])[:3, :3], (invert_rigid(poses[1]) @ poses[0])[:3, :3])
    assert angle < 1.0


def _relative(found: torch.Tensor, poses: torch.Tensor) -> None:
    """Both from photo 0, lengths up to one factor, as exactly as float32 points tell."""
    actual, expected = invert_rigid(found[0]) @ found, invert_rigid(poses[0]) @ poses
    expected[:, :3, 3] *= actual[1, :3, 3].norm() / expected[1, :3, 3].norm()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5)


def test_a_pair_that_joins_nothing_yet_waits() -> None:
    """The second best pair has no photo with the best one in common: it is attached after the third, which joins both."""
    generator = torch.Generator().manual_seed(0)
    poses = torch.cat([_world()[0], rigid(so3_exp(torch.tensor([[0.0, -0.3, 0.1]]).double()), torch.tensor([[0.3, 0.4, -0.2]]))])
    depths = 3 + torch.rand(4, *SIZE, generator=generator, dtype=torch.float64)
    points = [unproject(d, intrinsics(FOCAL, SIZE), pose) for d, pose in zip(depths, poses, strict=True)]
    best, predictions = {(0, 1): 9.0, (2, 3): 7.0, (1, 2): 5.0}, []
    for i, j in complete_pairs(4):
        sure = torch.full(SIZE, best.get((i, j), 4.0))
        in_first = [((1 + 0.1 * i) * transform(invert_rigid(poses[i]), points[n])).float() for n in (i, j)]
        predictions.append(PairPrediction(i, j, in_first[0], sure, in_first[1], sure))
    assert [(p.first, p.second) for p in spanning_tree(predictions, 4)] == list(best)
    state = initial_state(predictions, 4)
    _relative(pose_matrix(state.poses).double(), poses)
    torch.testing.assert_close((state.focals / 20).exp(), torch.full((4,), FOCAL), rtol=1e-5, atol=0.0)


def test_points_at_or_behind_the_camera_start_at_depth_one() -> None:
    predictions = _predictions()
    best = predictions[-1].points_first  # in the frame of photo 1, which is the world
    best[3, 4, 2], best[5, 6, 2] = 0.0, -1.0
    depths = initial_state(predictions, 3).depths
    assert depths[1, 3, 4] == depths[1, 5, 6] == 0
    assert depths.isfinite().all()
    assert int((depths == 0).sum()) == 2


@pytest.mark.parametrize(("confidence", "found"), [(2.9, False), (3.1, True)])
def test_a_photo_of_which_nothing_is_sure_starts_in_the_world_frame(confidence: float, found: bool) -> None:
    """Photo 2 is first in no pair of the tree, so that its pose comes from its sure points, where it has any."""
    unsure = torch.full(SIZE, confidence)
    predictions = [
        replace(
            p,
            confidence_first=unsure if p.first == 2 else p.confidence_first,
            confidence_second=unsure if p.second == 2 else p.confidence_second,
        )
        for p in _predictions()
    ]
    assert [(p.first, p.second) for p in spanning_tree(predictions, 3)] == [(0, 1), (1, 2)]
    poses = pose_matrix(initial_state(predictions, 3).poses).double()
    if found:
        _relative(poses, _world()[0])
    else:
        torch.testing.assert_close(poses[2], torch.eye(4, dtype=torch.float64))
        assert (poses[1] - torch.eye(4)).abs().max() > 0.1


def test_a_scene_is_cleaned_before_the_limit() -> None:
    """Two photos from one place: what floats in front of a surer photo's points goes, and so does what is below the limit."""
    depths = torch.full((2, *SIZE), 4.0)
    depths[0, 5, 7] = depths[1, 9, 9] = 2.0
    less, more = torch.full(SIZE, 2.0), torch.full(SIZE, 3.0)
    less[1, 1] = 1.5
    points = torch.zeros(*SIZE, 3)
    code = pose_code(torch.eye(4).repeat(2, 1, 1))
    state = AlignmentState(code, 20 * torch.full((2,), FOCAL).log(), depths.log(), torch.zeros(1, 8))
    scene = scene_of_state(ImageSet(torch.zeros(2, 3, *SIZE)), [PairPrediction(0, 1, points, less, points, more)], state, 1.5)
    assert (scene.confidence == 0).nonzero().tolist() == [[0, 1, 1], [0, 5, 7]]


def so3_angle_deg(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.rad2deg((((a.T @ b).trace() - 1) / 2).clamp(-1, 1).acos()))


def test_a_floating_point_is_cleaned_away() -> None:
    """Two photos from one place: what is nearer in one of them than in the surer other one goes."""
    K = intrinsics(FOCAL, SIZE)
    depths = torch.full((2, *SIZE), 4.0, dtype=torch.float64)
    depths[0, 5, 7], depths[0, 6, 8], depths[1, 9, 9] = 2.0, 6.0, 2.0
    points = torch.stack([unproject(d, K, torch.eye(4)) for d in depths]).float()
    cameras = Cameras(torch.stack([K, K]).float(), torch.eye(4).repeat(2, 1, 1), SIZE)
    confidence = torch.stack([torch.full(SIZE, 2.0), torch.full(SIZE, 3.0)])
    cleaned = cleaned_confidence(points, cameras, confidence)
    assert (cleaned == 0).nonzero().tolist() == [[0, 5, 7]]


def test_cleaning_is_that_of_one_point_after_the_other() -> None:
    """Three photos of scattered depths; a photo's points are judged after those of the photos before it."""
    generator = torch.Generator().manual_seed(0)
    poses, _ = _world()
    K = intrinsics(FOCAL, SIZE)
    depths = 3 + torch.rand(3, *SIZE, generator=generator, dtype=torch.float64)
    points = torch.stack([unproject(d, K, pose) for d, pose in zip(depths, poses, strict=True)])
    confidence = 1 + torch.rand(3, *SIZE, generator=generator, dtype=torch.float64)
    expected, inverses = confidence.clone(), [torch.linalg.inv(pose) for pose in poses]
    for i in range(3):
        for j in {0, 1, 2} - {i}:
            for row in range(SIZE[0]):
                for column in range(SIZE[1]):
                    x, y, z = (inverses[j][:3, :3] @ points[i, row, column] + inverses[j][:3, 3]).tolist()
                    u, v = FOCAL * x / z + float(K[0, 2]), FOCAL * y / z + float(K[1, 2])
                    if z <= 0 or not (0 <= u < SIZE[1] and 0 <= v < SIZE[0]):
                        continue
                    there = int(v), int(u)
                    if z < 0.999 * depths[j][there] and expected[i, row, column] < expected[j][there]:
                        expected[i, row, column] = 0
    cleaned = cleaned_confidence(points, Cameras(torch.stack([K] * 3), poses, SIZE), confidence)
    assert 0.05 < float((expected == 0).double().mean()) < 0.95
    assert torch.equal(cleaned, expected)


def test_pose_of_a_quaternion_of_any_length() -> None:
    from scipy.spatial.transform import Rotation

    generator = torch.Generator().manual_seed(0)
    code = 3 * torch.randn(20, 7, generator=generator, dtype=torch.float64)
    found = pose_matrix(code)
    torch.testing.assert_close(found[:, :3, :3], torch.from_numpy(Rotation.from_quat(code[:, :4].numpy()).as_matrix()))
    torch.testing.assert_close(found[:, :3, 3], code[:, 4:].sign() * (code[:, 4:].abs().exp() - 1))
    assert torch.autograd.gradcheck(lambda c: pose_matrix(c)[:, :3], code[:4].requires_grad_())


def test_products_are_made_as_asked_for() -> None:
    before = torch.get_float32_matmul_precision()
    with float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
        with float32_products("highest"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def _noisy() -> tuple[AlignmentState, list[PairPrediction]]:
    """A start on the CPU at which no residual is zero."""
    generator = torch.Generator().manual_seed(0)

    def shaken(x: torch.Tensor) -> torch.Tensor:
        return x + 0.02 * torch.randn(x.shape, generator=generator)

    names = ("points_first", "points_second")
    predictions = [replace(p, **{name: shaken(getattr(p, name)) for name in names}) for p in _predictions()]
    return AlignmentState(*map(shaken, initial_state(predictions, 3).parameters())), predictions


def test_the_first_step_goes_down_by_the_rate() -> None:
    """Adam's first step moves every parameter by the learning rate against the sign of its gradient."""
    start, predictions = _noisy()
    objective = Objective(predictions)
    moving = AlignmentState(*(p.requires_grad_() for p in start.parameters()))
    gradients = torch.autograd.grad(objective(moving), moving.parameters())
    state, losses = optimise(start, objective, steps=1, rate=0.01)
    assert losses == [pytest.approx(float(objective(start).detach()))]
    for before, after, gradient in zip(start.parameters(), state.parameters(), gradients, strict=True):
        clear = gradient.abs() > 1e-5  # Adam's epsilon does not count there
        expected = -0.01 * gradient.sign()
        torch.testing.assert_close((after - before).detach()[clear], expected[clear], rtol=2e-3, atol=1e-6)


def test_points_that_agree_to_the_bit_and_are_very_sure() -> None:
    """A weight above 4 over a distance of zero was infinite, and everything NaN after the first step."""
    eye = torch.eye(4, dtype=torch.float64)
    points = unproject(torch.full(SIZE, 4.0), intrinsics(32.0, SIZE), eye).float()
    sure = torch.full(SIZE, 1000.0)
    predictions = [PairPrediction(i, j, points, sure, points, sure) for i, j in complete_pairs(2)]
    code = pose_code(eye.repeat(2, 1, 1)).float()
    start = AlignmentState(
        code, 20 * torch.full((2,), 32.0).log(), torch.full((2, *SIZE), 2.0).log(), torch.cat([code, torch.zeros(2, 1)], dim=1)
    )
    state, losses = optimise(start, Objective(predictions), steps=3)
    assert losses[0] < 1e-5
    assert all(bool(p.isfinite().all()) for p in state.parameters())


def test_alignment_takes_gradients_where_the_caller_takes_none() -> None:
    images = ImageSet(torch.zeros(3, 3, *SIZE))
    expected = aligned_scene(images, _predictions(), steps=5)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = aligned_scene(images, [p.to("cpu") for p in _predictions()], steps=5)
        assert torch.equal(found.points, expected.points)


@pytest.mark.gpu
def test_a_recorded_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and again the next time; and the loss of the CPU while the steps have not diverged."""
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    start, predictions = _noisy()
    on_gpu, objective = start.to("cuda"), Objective([p.to("cuda") for p in predictions])
    runs = [optimise(on_gpu, objective, steps=40, recorded=recorded) for recorded in (True, False, True)]
    for state, losses in runs[1:]:
        assert losses == runs[0][1]
        assert all(torch.equal(a, b) for a, b in zip(state.parameters(), runs[0][0].parameters(), strict=True))
    _, expected = optimise(start, Objective(predictions), steps=40)  # the rates depend on their number
    assert runs[0][1][:10] == pytest.approx(expected[:10], rel=1e-3)


@pytest.mark.gpu
def test_scene_on_a_gpu() -> None:
    images = ImageSet(torch.zeros(3, 3, *SIZE))
    expected = aligned_scene(images, _predictions(), steps=0)
    found = aligned_scene(images, [p.to("cuda") for p in _predictions()], steps=0)
    assert found.points.device.type == found.cameras.K.device.type == "cpu"
    torch.testing.assert_close(found.points, expected.points, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(found.cameras.world_from_cam, expected.cameras.world_from_cam, rtol=0.0, atol=1e-3)
    assert torch.equal(found.confidence, expected.confidence)
