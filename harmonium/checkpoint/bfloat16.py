"""bfloat16 as uint16 bits, in NumPy: the upper half of a float32.

Source: bfloat16 keeps float32's sign and 8 exponent bits and the first 7 of its 23 fraction bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def decode_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values that the bits stand for; exact. Same shape, a new array."""
    values: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def encode_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16 bits, ties to even; infinities stay, NaNs become quiet. A new array."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Adding the rounding term to a NaN could carry it into infinity or the sign.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    halves: npt.NDArray[np.uint16] = np.where(is_nan, quiet, rounded).astype(np.uint16)
    return halves.reshape(np.shape(values))
