// Clients made from the .proto files of this repository and of grpc.health.v1.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { protoPath as HEALTH_PROTO } from "grpc-health-check";

export { grpc };

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));

// Names as in the .proto files; 64-bit integers, such as seeds, as strings, since a number would round them.
export const OPTIONS = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };

/** Stubs of the services at two addresses: { executor, tokenizer, health }; health is the executor's. */
export function connect(executorAddress, tokenizerAddress, credentials = grpc.credentials.createInsecure()) {
  const files = ["mxgpt/v1/executor.proto", "mxgpt/v1/tokenizer.proto", HEALTH_PROTO];
  const { mxgpt, grpc: known } = grpc.loadPackageDefinition(
    protoLoader.loadSync(files, { ...OPTIONS, includeDirs: [PROTOS] }),
  );
  return {
    executor: new mxgpt.v1.ExecutorService(executorAddress, credentials),
    tokenizer: new mxgpt.v1.TokenizerService(tokenizerAddress, credentials),
    health: new known.health.v1.Health(executorAddress, credentials),
  };
}
