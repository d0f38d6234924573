"""Tests of the rotary frequencies and angles against stored numbers of PyTorch and against float64."""

import jax
import numpy as np
import pytest

from dbrx_jax.ops.rope import frequencies, rotate

# By head size and theta: 1 / theta ** (torch.arange(0, K, 2).float() / K) of torch 2.13.0, as transformers 4.57.6
# computes it; big-endian float32.
TORCH = {
    (64, 10000): (
        "3f8000003f3ff9113f0ff59a3ed7e89b3ea1e89b3e72d4233e3618873e088d773dcccccd3d99940d3d6655c23d2cba153d0186e3"
        "3cc2434f3c91ad393c5a7bf23c23d70a3bf5b9b03bb8449c3b8a2e773b4f3e383b1b690d3ae915283aaec98e3a83126f3a44948c"
        "3a136a1639dd172539a5cb603978a815393a7753390bd472"
    ),
    (128, 10000): (
        "3f8000003f5dafd73f3ff9113f263de03f0ff59a3ef953cf3ed7e89b3ebaf81b3ea1e89b3e8c35043e72d4233e5247ed3e361887"
        "3e1db0403e088d773dec7fd63dcccccd3db159783d99940d3d84fe4d3d6655c23d47763f3d2cba153d1593483d0186e33ce054d2"
        "3cc2434f3ca8398b3c91ad393c7c4d333c5a7bf23c3d33113c23d70a3c0de12d3bf5b9b03bd4ca153bb8449c3b9f91cc3b8a2e77"
        "3b6f520e3b4f3e383b33770f3b1b690d3b06946f3ae915283ac9d75c3aaec98e3a975c0e3a83126f3a6301e23a44948c3a2a3b44"
        "3a136a1639ff4fac39dd172539bf74d739a5cb60398f92723978a815395753e4393a775339217916390bd47238f22ce2"
    ),
    (64, 500000): (
        "3f8000003f29e1c63ee177bc3e959ee33e4693b03e03c6a03daee4ad3d681e673d1a08c83ccc6f493c87a9c33c340d6d3beef74f"
        "3b9e94023b5277203b0baa413ab95d213a7603ea3a23418d39d8ac81398fc8f8393ed4f438fd45c338a8126b385f10c4381406cb"
        "37c4761037825f34372d07a736e5a54d369864a7364a41b0"
    ),
    (128, 500000): (
        "3f8000003f508ac13f29e1c63f0a63843ee177bc3eb7ab7d3e959ee33e73c4613e4693b03e21c3a03e03c6a03dd6b19c3daee4ad"
        "3d8e78983d681e673d3d16843d1a08c83cfaf53f3ccc6f493ca689393c87a9c33c5d06ec3c340d6d3c12ac7f3beef74f3bc2aa76"
        "3b9e94023b812e353b5277203b2b72dc3b0baa413ae38c103ab95d213a9700233a7603ea3a4868863a23418d3a04fdbf39d8ac81"
        "39b08199398fc8f8396a426f393ed4f4391b747538fd45c338ce51f538a8126b3888ea0f385f10c43835b687381406cb37f12b80"
        "37c4761037a00a6937825f3437546808372d07a7370cf40036e5a54d36bb12c7369864a7367848c2364a41b03624c2ff"
    ),
}


@pytest.mark.parametrize(("head_dim", "theta"), TORCH)
def test_frequencies_equal_those_of_torch_in_every_bit(head_dim, theta):
    expected = np.frombuffer(bytes.fromhex(TORCH[head_dim, theta]), ">f4").astype(np.float32)
    assert frequencies(head_dim, theta).dtype == np.float32
    np.testing.assert_array_equal(frequencies(head_dim, theta), expected)


@pytest.mark.parametrize(("head_dim", "theta"), TORCH)
@pytest.mark.parametrize("position", [1, 2_000, 16_000, 32_767, 1_000_000])
def test_cosines_and_sines_of_large_angles_are_exact(head_dim, theta, position):
    """Compiled, a vector of ones and zeros is rotated to the cosines and sines of the float32 angles."""
    x = np.zeros((1, 1, 1, head_dim), np.float32)
    x[..., : head_dim // 2] = 1
    torch_frequencies = np.frombuffer(bytes.fromhex(TORCH[head_dim, theta]), ">f4").astype(np.float32)
    angle = (np.float32(position) * torch_frequencies).astype(np.float64)
    rotated = jax.jit(rotate, static_argnums=2)(x, np.array([[position]], np.int32), theta)
    expected = np.concatenate([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(np.asarray(rotated).ravel(), expected, rtol=0, atol=1e-7)
