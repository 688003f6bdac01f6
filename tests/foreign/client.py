"""A foreign client: publishes what it reads as JSON on standard input, prints the replies it gets.

The order is one object: {"url", "replies": how many to wait for, "seconds": at most how long,
"messages": [{"exchange", "key", "body" or "body_hex", "reply": true for a reply_to of its own,
"properties": {pika's names}, "property_bytes": {name: hex}, "headers", "header_bytes": {name: hex},
"many_headers": how many, "raw_properties": hex of the flags and the properties in place of all these,
"key_bytes": hex in place of "key"}]}.
Knows nothing of Garenne.
"""

import json
import sys
import time

import pika


class RawProperties(pika.BasicProperties):
    """Whatever bytes, where the properties belong."""

    def __init__(self, raw):
        super().__init__()
        self.raw = raw

    def encode(self):
        return [self.raw]


def properties(message, reply_queue):
    if "raw_properties" in message:
        return RawProperties(bytes.fromhex(message["raw_properties"]))
    given = dict(message.get("properties", {}))
    for name, text in message.get("property_bytes", {}).items():
        given[name] = bytes.fromhex(text)
    headers = message.get("headers")
    if "header_bytes" in message:
        headers = {name: bytes.fromhex(text) for name, text in message["header_bytes"].items()}
    if "many_headers" in message:
        headers = (headers or {}) | {f"h{number}": number for number in range(message["many_headers"])}
    if message.get("reply"):
        given["reply_to"] = reply_queue
    return pika.BasicProperties(headers=headers, **given)


def body(message):
    if "body_hex" in message:
        return bytes.fromhex(message["body_hex"])
    return message.get("body", "").encode()


def routing_key(message):
    return bytes.fromhex(message["key_bytes"]) if "key_bytes" in message else message["key"]


def main():
    order = json.load(sys.stdin)
    connection = pika.BlockingConnection(pika.URLParameters(order["url"]))
    channel = connection.channel()
    channel.confirm_delivery()
    reply_queue = channel.queue_declare("", exclusive=True).method.queue
    for message in order["messages"]:
        channel.basic_publish(
            message["exchange"], routing_key(message), body(message), properties(message, reply_queue)
        )
    end = time.monotonic() + order["seconds"]
    left = order["replies"]
    while left:
        method, got, content = channel.basic_get(reply_queue, auto_ack=True)
        if method is None:
            if time.monotonic() > end:
                sys.exit(f"{left} replies are missing")
            connection.sleep(0.02)
            continue
        reply = {
            "type": got.type,
            "message_id": got.message_id,
            "correlation_id": got.correlation_id,
            "content_type": got.content_type,
            "body": json.loads(content),
        }
        print(json.dumps(reply))
        left -= 1
    connection.close()


main()
