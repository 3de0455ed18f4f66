// Reads the google.rpc details that mxgpt sends with every error: a stable reason, the field at fault, when to retry.

import protobuf from "protobufjs";

// google/rpc/status.proto and error_details.proto, as much as mxgpt sends.
const RPC = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest { repeated FieldViolation field_violations = 1; }
  message FieldViolation { string field = 1; string description = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
`, { keepCase: true }).root;

/** { reason, field, retryAfter (seconds), metadata } of an error of a call; null where the server sent none. */
export function details(error) {
  const [serialized] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (serialized === undefined) return null;
  const found = { reason: null, field: null, retryAfter: null, metadata: {} };
  for (const { type_url: url, value } of RPC.lookupType("Status").decode(serialized).details) {
    const name = url.slice(url.lastIndexOf(".") + 1);
    if (!["ErrorInfo", "BadRequest", "RetryInfo"].includes(name)) continue;
    const detail = RPC.lookupType(name).decode(value);
    if (name === "ErrorInfo") Object.assign(found, { reason: detail.reason, metadata: { ...detail.metadata } });
    if (name === "BadRequest") found.field = detail.field_violations[0]?.field ?? null;
    if (name === "RetryInfo") found.retryAfter = Number(detail.retry_delay.seconds) + detail.retry_delay.nanos / 1e9;
  }
  return found;
}
