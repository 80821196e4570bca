"""What clients send to the HTTP service, as arrays and measurements."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.measurement.load import Measurement
from pipelines.cli.options import ProfileOptions
from pipelines.prediction.service_schemas import MAX_PROFILES, FileRequest
from pipelines.prediction.workflow import FILE_ERRORS, PredictError, read_measurements


def array_from_npy(file: bytes, points: int) -> NDArray[np.float32]:
    """Return the profiles, shape (n, points), of an NPY file; nothing in it is executed.

    Raises
    ------
    PredictError
        If it is no NPY file, or holds no real numbers of that shape.
    """
    stream = io.BytesIO(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, by_column, dtype = read_header[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, EOFError) as error:
        raise PredictError(
            "The body is no NPY file. Send what numpy.save writes, or JSON to POST /predict."
        ) from error
    rows = shape[0] if len(shape) == 2 else 0
    if dtype.kind != "f" or by_column or not 1 <= rows <= MAX_PROFILES or shape[1] != points:
        raise PredictError(
            f"Real numbers of shape (n, {points}) are expected, in C order, n at most "
            f"{MAX_PROFILES}; the file holds {dtype} of shape {shape}"
            f"{', in Fortran order' if by_column else ''}."
        )
    values = stream.read()
    expected = rows * points * dtype.itemsize
    if len(values) != expected:
        raise PredictError(
            f"The NPY file is cut off or too long: {len(values)} bytes follow its header, its "
            f"shape needs {expected}."
        )
    with np.errstate(over="ignore"):  # the model refuses infinity with a message of its own
        return np.frombuffer(values, dtype).reshape(rows, points).astype(np.float32)


def measurements_from_request(request: FileRequest, campaign: Campaign) -> list[Measurement]:
    """Read and prepare the profiles of a request.

    Parameters
    ----------
    request
        Texts of the profile and of its calibration. Its name is used in messages only: on disk it
        could be a directory, too long, or the calibration's.
    campaign
        The model's campaign.

    Raises
    ------
    PredictError
        If the texts cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="bragg-service-") as directory:
        path, calibration = Path(directory) / "profile", None
        try:
            path.write_text(request.text, encoding="utf-8")
            if request.instrument is not None:
                calibration = Path(directory) / "calibration.instprm"
                calibration.write_text(request.instrument, encoding="utf-8")
            options = ProfileOptions(calibration, request.bank, request.two_theta)
            return read_measurements(path, campaign, options)
        except UnicodeEncodeError as error:
            raise PredictError(f"{request.name} is not a text: {error.reason}.") from error
        except FILE_ERRORS as error:
            # The temporary directory is of no use to the client.
            message = str(error).replace(str(path), request.name)
            raise PredictError(message.replace(f"{directory}/", "")) from error
