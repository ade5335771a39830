"""Write files of microscopes for tests, by the published structure of each kind: ND2 of Nikon, LIF of Leica.

Files of ZEISS are written by its own package in ``test_microscope_files.py``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

# --- ND2: chunks with names, a map of them at the end, and records of types and names ---------------------------------

ND2_MAGIC = 0x0ABECEDA
ND2_PAGE = 4096  # bytes; chunks begin on a page
ND2_NAME = 4072  # bytes of a name: with header and a time before them, pixels begin on the next page


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<IIQ", ND2_MAGIC, ND2_NAME, len(content)) + name.ljust(ND2_NAME, b"\0") + content


def _record(name: str, value: object) -> bytes:
    """One value with its type and its name in UTF-16; a dict is a level of further records."""
    text = (name + "\0").encode("utf-16-le")
    kinds = {bool: (1, "<B"), int: (3, "<I"), float: (6, "<d")}
    if isinstance(value, dict):
        head = struct.pack("<BB", 11, len(text) // 2) + text
        parts = [_record(key, one) for key, one in value.items()]
        offsets, place = b"", len(head) + 12
        for part in parts:
            offsets += struct.pack("<Q", place)
            place += len(part)
        return head + struct.pack("<IQ", len(parts), place) + b"".join(parts) + offsets
    if isinstance(value, str):
        return struct.pack("<BB", 8, len(text) // 2) + text + (value + "\0").encode("utf-16-le")
    if isinstance(value, bytes):
        return struct.pack("<BB", 9, len(text) // 2) + text + struct.pack("<Q", len(value)) + value
    kind, code = kinds[type(value)]
    return struct.pack("<BB", kind, len(text) // 2) + text + struct.pack(code, value)


def _loops(counts: dict[str, int]) -> dict[str, object]:
    """The experiment: one loop inside the other."""
    (letter, count), *inner = counts.items()
    loop: dict[str, object]
    if letter == "T":
        loop = {"eType": 1, "uLoopPars": {
            "uiCount": count, "dStart": 0.0, "dPeriod": 1.0, "dDuration": 1.0, "dMinPeriodDiff": 0.0,
            "dMaxPeriodDiff": 0.0, "dAvgPeriodDiff": 0.0,
        }}  # fmt: skip
    elif letter == "P":
        points = {f"i{k:010}": {"dPosX": float(k), "dPosY": 0.0, "dPosZ": 0.0, "dPFSOffset": 0.0} for k in range(count)}
        loop = {"eType": 2, "uLoopPars": {"uiCount": count, "Points": points}, "pItemValid": bytes([1] * count)}
    else:
        loop = {"eType": 4, "uLoopPars": {
            "uiCount": count, "dZLow": 0.0, "dZHigh": float(count - 1), "dZStep": 1.0, "dZHome": 0.0, "iType": 0,
            "bZInverted": False,
        }}  # fmt: skip
    if inner:
        loop["ppNextLevelEx"] = {"i0000000000": _loops(dict(inner))}
        loop["uiNextLevelCount"] = 1
    return loop


def write_nd2(
    path: Path, array: np.ndarray, axes: str, pixel_um: float | None = 0.25, recorded: int | None = None
) -> None:
    """An ND2 file of version 3.0, uncompressed.

    Args:
        array: axes in an order such as TPZCYX, or ending in YXS for blue, green and red.
        pixel_um: width of a pixel; None for a microscope that was not calibrated.
        recorded: frames that the recording reached; None for all.
    """
    is_colour = axes.endswith("S")
    sizes = dict(zip(axes, array.shape, strict=True))
    loops = {letter: sizes[letter] for letter in axes if letter in "TPZ"}
    count = int(np.prod(list(loops.values()))) if loops else 1
    channels, height, width = sizes.get("C", 1), sizes["Y"], sizes["X"]
    parts = 3 if is_colour else 1
    frames = array.reshape(count, height, width, 3) if is_colour else array.reshape(count, channels, height, width)
    frames = frames if is_colour else np.moveaxis(frames, 1, -1)  # channels are the last axis in the file
    bits = array.dtype.itemsize * 8
    attributes = {"SLxImageAttributes": {
        "uiWidth": width, "uiWidthBytes": width * channels * parts * bits // 8, "uiHeight": height,
        "uiComp": channels * parts, "uiBpcInMemory": bits, "uiBpcSignificant": bits,
        "uiSequenceCount": recorded or count, "uiTileWidth": width, "uiTileHeight": height,
        "eCompression": 2, "dCompressionParam": -1.0,
        "ePixelType": 1, "uiVirtualComponents": channels * parts,
    }}  # fmt: skip
    planes = {
        f"a{k}": {"uiCompCount": parts, "uiColor": 255 << (8 * (k % 3)), "sDescription": f"channel {k + 1}",
                  "uiSampleIndex": 0, "uiModalityMask": 1, "pFluorescentProbe": {"m_uiColor": 255}}
        for k in range(channels)
    }  # fmt: skip
    sample = {"a0": {"pObjectiveSetting": {"dObjectiveMag": 20.0, "dObjectiveNA": 0.75}, "uiModeFQ": 0}}
    picture = {"SLxPictureMetadata": {
        "dTimeAbsolute": 2459000.5, "dTimeMSec": 0.0, "dXPos": 0.0, "dYPos": 0.0, "dZPos": 0.0, "dAngle": 0.0,
        "dCalibration": pixel_um or 0.0, "bCalibrated": pixel_um is not None, "dAspect": 1.0, "dZoom": 1.0,
        "sPicturePlanes": {"uiCount": channels, "uiCompCount": channels * parts, "sPlaneNew": planes,
                           "uiSampleCount": 1, "sSampleSetting": sample},
    }}  # fmt: skip
    names = {"T": "T", "P": "XY", "Z": "Z"}
    text = " x ".join([*(f"{names[letter]}({number})" for letter, number in loops.items()), f"\u03bb({channels})"])
    content = {
        b"ImageAttributesLV!": b"".join(_record(*one) for one in attributes.items()),
        b"ImageMetadataSeqLV|0!": b"".join(_record(*one) for one in picture.items()),
        b"CustomData|AcqTimesCache!": np.arange(count, dtype=np.float64).tobytes(),
        b"ImageTextInfoLV!": _record("SLxImageTextInfo", {"TextInfoItem_5": f"Metadata:\r\nDimensions: {text}\r\n"}),
        b"ImageCalibrationLV|0!": _record("SLxCalibration", {"dCalibration": pixel_um or 0.0}),
    }
    if loops:
        content[b"ImageMetadataLV!"] = _record("SLxExperiment", _loops(loops))
    for number, frame in enumerate(frames[: recorded or count]):
        content[f"ImageDataSeq|{number}!".encode()] = struct.pack("<d", 0.0) + np.ascontiguousarray(frame).tobytes()
    name = b"ND2 FILE SIGNATURE CHUNK NAME01!"
    file = struct.pack("<IIQ", ND2_MAGIC, 32, 64) + name + b"Ver3.0".ljust(64, b"\0")
    file = file.ljust(ND2_PAGE, b"\0")
    places = b""
    for name, one in content.items():
        places += name + struct.pack("<QQ", len(file), len(one))
        file += _chunk(name, one)
        file = file.ljust(-(-len(file) // ND2_PAGE) * ND2_PAGE, b"\0")
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("<Q", len(file))
    map_name = b"ND2 FILEMAP SIGNATURE NAME 0001!"
    file += struct.pack("<IIQ", ND2_MAGIC, len(map_name), len(places) + len(end)) + map_name + places + end
    path.write_bytes(file)


# --- LIF: a description in XML, then one block of pixels for each image -----------------------------------------------

_LIF_AXES = {"X": 1, "Y": 2, "Z": 3, "T": 4, "M": 10}


def _lif_image(name: str, array: np.ndarray, axes: str, pixel_um: float | None, block: str) -> str:
    size, stride = array.dtype.itemsize, {}
    bytes_inc = size
    for letter, count in zip(reversed(axes), reversed(array.shape), strict=True):
        stride[letter] = bytes_inc
        bytes_inc *= count
    sizes = dict(zip(axes, array.shape, strict=True))
    many = "S" if "S" in axes else "C"
    channels = "".join(
        f'<ChannelDescription DataType="0" ChannelTag="{3 - k if many == "S" else 0}" Resolution="{8 * size}" '
        f'NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" LUTName="Gray" IsLUTInverted="0" '
        f'BytesInc="{k * stride.get(many, 0)}" BitInc="0"/>'
        for k in range(sizes.get(many, 1))
    )
    dimensions = "".join(
        f'<DimensionDescription DimID="{_LIF_AXES[letter]}" NumberOfElements="{sizes[letter]}" Origin="0" '
        f'Length="{(pixel_um or 0) * 1e-6 * (sizes[letter] - 1):.9e}" Unit="m" BitInc="0" BytesInc="{stride[letter]}"/>'
        for letter in "XYZTM"
        if letter in axes
    )
    return (
        f'<Element Name="{name}" Visibility="1" UniqueID="{block}"><Data><Image TextDescription=""><ImageDescription>'
        f"<Channels>{channels}</Channels><Dimensions>{dimensions}</Dimensions></ImageDescription></Image></Data>"
        f'<Memory Size="{array.nbytes}" MemoryBlockID="{block}"/><Children></Children></Element>'
    )


def write_lif(path: Path, images: dict[str, tuple[np.ndarray, str]], pixel_um: float | None = 0.25) -> None:
    """A LIF file of version 2.

    Args:
        images: name -> array and its axes, such as TZCYX, or YXS for blue, green and red.
    """
    blocks = [f"MemBlock_{number}" for number in range(1, len(images) + 1)]
    elements = "".join(
        _lif_image(name, array, axes, pixel_um, block)
        for block, (name, (array, axes)) in zip(blocks, images.items(), strict=True)
    )
    xml = (
        f'<LMSDataContainerHeader Version="2"><Element Name="{path.name}" Visibility="1"><Data><Experiment/></Data>'
        f'<Memory Size="0" MemoryBlockID="MemBlock_0"/><Children>{elements}</Children></Element>'
        "</LMSDataContainerHeader>"
    )
    text = xml.encode("utf-16-le")
    file = struct.pack("<IIBI", 0x70, len(text) + 5, 0x2A, len(xml)) + text
    for block, (array, _) in zip(blocks, images.values(), strict=True):
        name = block.encode("utf-16-le")
        file += struct.pack("<IIBQBI", 0x70, len(name) + 14, 0x2A, array.nbytes, 0x2A, len(block)) + name
        file += np.ascontiguousarray(array).tobytes()
    path.write_bytes(file)
