from __future__ import annotations

import torch
from torch import nn

from fvgen.evaluation.frechet import FrameFeatures, Gaussian, frechet_distance


def gaussian(x: torch.Tensor, pieces: int = 1) -> Gaussian:
    found = Gaussian()
    for part in x.chunk(pieces):
        found.add(part)
    return found


def test_mean_and_covariance_do_not_depend_on_the_pieces() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    found = gaussian(x, 7)
    torch.testing.assert_close(found.mean, x.double().mean(0))
    torch.testing.assert_close(found.covariance, x.double().T.cov())


def test_distance_in_closed_form() -> None:
    """Samples whitened to exact moments; for commuting covariances the distance is that of the means plus that of the roots."""
    draw = torch.Generator().manual_seed(1)
    white = torch.randn(64, 3, generator=draw, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov()).T)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64)).Q
    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 0.0, 0.7]).double()
    shift = torch.tensor([0.3, -1.0, 2.0]).double()
    one, two = gaussian(white * a @ turn), gaussian(white * b @ turn + shift)
    expected = shift.square().sum() + (a - b).square().sum()
    assert abs(frechet_distance(one, two) - float(expected)) < 1e-6
    assert abs(frechet_distance(two, one) - float(expected)) < 1e-6
    assert abs(frechet_distance(one, one)) < 1e-9


def test_distance_of_covariances_that_do_not_commute() -> None:
    """Against the root of the product of both, from its eigenvalues."""
    draw = torch.Generator().manual_seed(2)
    one, two = (gaussian(torch.randn(40, 5, generator=draw) @ torch.randn(5, 5, generator=draw)) for _ in range(2))
    root = torch.linalg.eigvals(one.covariance @ two.covariance).sqrt().sum().real
    expected = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * root
    assert abs(frechet_distance(one, two) - float(expected)) < 1e-8 * float(expected)


def test_features_are_the_moments_of_every_level() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(3, 3, 1)
            self.conv_in.weight.data = torch.eye(3)[..., None, None]
            self.conv_in.bias.data.zero_()
            self.down_blocks = nn.ModuleList([nn.AvgPool2d(2), nn.AvgPool2d(2)])

    vae = nn.Module()
    vae.encoder = Encoder()
    frames = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = FrameFeatures(vae)(frames, at_once=2)
    assert found.shape == (5, 12)
    half = nn.functional.avg_pool2d(2 * frames - 1, 2)
    quarter = nn.functional.avg_pool2d(half, 2)
    expected = [half.mean((2, 3)), half.std((2, 3)), quarter.mean((2, 3)), quarter.std((2, 3))]
    torch.testing.assert_close(found, torch.cat(expected, 1))
