"""The wire contract of ome-tensor (``v1/*.proto``: their comments are the specification) and what both ends need to speak it.

What a server does::

    plan = codec.plan_from_proto(request.view)          # refuses a malformed message by field path and value
    tiling = codec.tiling_from_proto(request.tiling) if request.HasField("tiling") else Tiling()
    tiles = TileSequence(plan.resolve(...).shown, tiling, codec.order_from_proto(request.order))
    format = BatchFormat.of(tiles.shape, dtype, variable=not tiles.uniform, layout=..., shape=..., key=..., dataset_version=...)
    writer = TileWriter(format)
    yield writer.opening(ReadTilesHeader(...))          # header and schema
    message = writer.batch([tiles[0], tiles[1]])        # one allocation
    ...                                                 # gather into message.pixels[0], message.pixels[1]: they lie in it
    yield message.finish(gather_us=...)                 # the same bytes, uncopied
    yield writer.closing()                              # or last=True with the last batch

A tile larger than a message goes out in slabs: ``split_into_slabs`` (of ``ome_tensor.slabs``) and ``TileWriter.slab``, with a
format that is variable. An error raised anywhere ends the call with ``context.abort_with_status(status.to_status(error))``.

What a client does::

    call = channel.unary_stream(METHODS["ReadTiles"].path, ReadTilesRequest.SerializeToString, None)(request)
    reader = BatchReader(start=order.start)
    try:
        for message in call:
            batch = reader.feed(message)                # arrays in the message's own memory; None without a batch
    except grpc.RpcError as error:
        raise status.from_rpc_error(error) from error
    reader.finish()                                     # BrokenStream unless the read was complete

Modules: ``codec`` (behind it ``cuts`` and ``fields``) and ``listing`` (domain <-> messages),
``status`` (errors <-> status), ``methods`` (paths and classes of the RPCs),
``batch_format`` (the Arrow schema of a stream), ``batches`` (writing messages), ``reader`` (reading them); below these ``ipc`` (Arrow's
metadata) and ``envelope`` (protobuf around a payload). Import from the modules: this package itself imports nothing.
"""
