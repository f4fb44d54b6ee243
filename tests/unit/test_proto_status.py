"""The status table: every error arrives as what it was, through pickling and through a real server."""

import pickle
from concurrent import futures

import grpc
import pytest

from ome_tensor import errors
from ome_tensor.errors import OmeTensorError, Reason
from ome_tensor_proto.methods import ADMIN_METHODS, METHODS, SERVICE
from ome_tensor_proto.status import STATUS_CODES, from_rpc_error, to_status

CLASSES = [
    cls
    for cls in (getattr(errors, name) for name in errors.__all__)
    if issubclass(cls, OmeTensorError) and cls is not OmeTensorError
]


def test_every_reason_has_a_code_and_every_class_a_reason():
    assert set(STATUS_CODES) == set(Reason)
    assert {cls.reason for cls in CLASSES} == set(Reason)


@pytest.fixture(scope="module")
def raises():
    """A function that makes a real server raise an error, unary or in the middle of a stream, and gives what the client got."""
    failing = {}

    def get_dataset(request, context):
        context.abort_with_status(to_status(failing["error"]))

    def read_tiles(request, context):
        yield b"\x10\x01"
        context.abort_with_status(to_status(failing["error"]))

    unary, stream = METHODS["GetDataset"], METHODS["ReadTiles"]
    assert stream.streaming
    assert not unary.streaming
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handlers = {
        "GetDataset": grpc.unary_unary_rpc_method_handler(
            get_dataset, unary.request.FromString, unary.response.SerializeToString
        ),
        "ReadTiles": grpc.unary_stream_rpc_method_handler(read_tiles, stream.request.FromString, None),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call_unary = channel.unary_unary(unary.path, unary.request.SerializeToString, unary.response.FromString)
        call_stream = channel.unary_stream(stream.path, stream.request.SerializeToString, None)

        def run(error, midstream):
            failing["error"] = error
            if not midstream:
                with pytest.raises(grpc.RpcError) as caught:
                    call_unary(unary.request())
                return caught.value
            call = call_stream(stream.request())
            assert next(call) == b"\x10\x01"
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            return caught.value

        yield run
    assert server.stop(None).wait(10)


@pytest.mark.parametrize("midstream", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_arrives_as_it_was(raises, cls, midstream):
    sent = cls("größer als 100 % · no such thing", field="view.roi", value=(1, 2))
    rpc_error = raises(sent, midstream)
    assert rpc_error.code() is STATUS_CODES[cls.reason]
    for found in (from_rpc_error(rpc_error), pickle.loads(pickle.dumps(from_rpc_error(rpc_error)))):
        assert type(found) is cls
        assert (found.message, found.field, found.value) == (sent.message, sent.field, sent.value)
        assert found.__cause__ is None


@pytest.mark.parametrize("cls", CLASSES)
def test_without_field_and_value(raises, cls):
    found = from_rpc_error(raises(cls("no"), False))
    assert (type(found), found.message, found.field, found.value) == (cls, "no", None, None)


def test_a_subclass_arrives_as_the_class_of_its_reason(raises):
    class Special(errors.InvalidSelection, IndexError):
        pass

    assert type(from_rpc_error(raises(Special("no"), False))) is errors.InvalidSelection


def test_the_text_of_a_foreign_exception_stays_on_the_server(raises):
    found = from_rpc_error(raises(RuntimeError("secret /path"), True))
    assert type(found) is errors.ServerError
    assert "secret" not in found.message


@pytest.mark.parametrize("letter", ["x", "ä", "€", "😀", "\ud800"])
def test_a_long_error_fits_in_the_metadata(raises, letter):
    sent = errors.InvalidArgument(letter * 5000, field=letter * 5000, value=letter * 5000)
    found = from_rpc_error(raises(sent, False))
    assert type(found) is errors.InvalidArgument
    assert len(found.message.encode()) <= 1000
    assert found.message.endswith("…")
    if letter != "\ud800":
        assert found.value == sent.value


class Bare(grpc.RpcError):
    """What gRPC raises by itself: no details."""

    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return None


@pytest.mark.parametrize(
    "code, cls",
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.UNIMPLEMENTED, errors.NotSupported),
        (grpc.StatusCode.NOT_FOUND, errors.ImageNotFound),
        (grpc.StatusCode.INTERNAL, errors.ServerError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.NotAllowed),
        (grpc.StatusCode.ABORTED, errors.ServerError),
    ],
)
def test_a_status_without_details_is_read_by_its_code(code, cls):
    found = from_rpc_error(Bare(code, "text"))
    assert type(found) is cls
    assert "text" in found.message
    assert type(from_rpc_error(Bare(code, None))) is cls


def test_grpcs_own_size_limit_is_a_limit():
    text = "CLIENT: Received message larger than max (5 vs. 4)"
    assert type(from_rpc_error(Bare(grpc.StatusCode.RESOURCE_EXHAUSTED, text))) is errors.LimitExceeded


def test_details_that_are_not_ours_do_not_count():
    bare = Bare(grpc.StatusCode.UNAVAILABLE, "text")
    for data in (b"\xff\xff", b"", b"\x08\x05\x12\x04text"):
        bare.trailing_metadata = lambda data=data: (("grpc-status-details-bin", data),)
        assert type(from_rpc_error(bare)) is errors.Unavailable
    assert type(from_rpc_error(grpc.RpcError("bare"))) is errors.ServerError


def test_the_method_table_is_the_contract():
    assert set(METHODS) == {"ListDatasets", "GetDataset", "ListImages", "SelectImages", "ResolveView", "ReadTiles", "MapDataset"}
    assert set(ADMIN_METHODS) == {
        "RegisterDataset",
        "UploadDataset",
        "RefreshDataset",
        "RemoveDataset",
        "LoadDataset",
        "CancelLoad",
        "GetMetrics",
    }
    for service, methods in (("TensorService", METHODS), ("AdminService", ADMIN_METHODS)):
        for name, method in methods.items():
            assert method.path == f"/ome_tensor_proto.v1.{service}/{name}"
            assert method.request.DESCRIPTOR.name == f"{name}Request"
            assert method.response.DESCRIPTOR.name == f"{name}Response"
            assert method.takes_stream == (name == "UploadDataset")
