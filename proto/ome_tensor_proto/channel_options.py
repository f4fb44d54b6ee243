"""What both ends of a connection ask of gRPC."""

from __future__ import annotations

from typing import Any

__all__ = ["CHANNEL_OPTIONS"]

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    # Measured (PERFORMANCE): large HTTP/2 frames, fewer wake-ups.
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    ("grpc.max_send_message_length", -1),
    # An end whose machine vanished without a word is noticed within a minute; one that died is noticed at once.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # What gRPC goes by in truth, whatever else comes (grpc/grpc#39239): without it a minute. A window of 4 MiB may be before the answer: that is
    # a link of 1 Mbit/s.
    ("grpc.http2.ping_timeout_ms", 30_000),
)
