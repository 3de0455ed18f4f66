// Clients made of what a server says about itself (grpc.reflection.v1alpha): no .proto file of mxgpt is read.

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";
import { OPTIONS } from "./from_protos.js";

// As much of grpc.reflection.v1alpha as asking for a service's files takes.
const REFLECTION = protobuf.parse(`
  syntax = "proto3";
  message Request { string file_containing_symbol = 4; }
  message Files { repeated bytes file_descriptor_proto = 1; }
  message Failure { int32 error_code = 1; string error_message = 2; }
  message Response { Files file_descriptor_response = 4; Failure error_response = 7; }
`, { keepCase: true }).root;
const Request = REFLECTION.lookupType("Request");
const Response = REFLECTION.lookupType("Response");
const METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

/** Stubs of the services at two addresses: { executor, tokenizer, health }; health is the executor's. */
export async function connect(executorAddress, tokenizerAddress, credentials = grpc.credentials.createInsecure()) {
  return {
    executor: await reflect(executorAddress, "mxgpt.v1.ExecutorService", credentials),
    tokenizer: await reflect(tokenizerAddress, "mxgpt.v1.TokenizerService", credentials),
    health: await reflect(executorAddress, "grpc.health.v1.Health", credentials),
  };
}

/** A stub of one service, from the descriptors that the server has of it. */
async function reflect(address, service, credentials) {
  const files = await filesOf(address, service, credentials);
  const set = protobuf.Writer.create(); // a FileDescriptorSet: every file is its field 1
  for (const file of files) set.uint32((1 << 3) | 2).bytes(file);
  const definition = protoLoader.loadFileDescriptorSetFromBuffer(Buffer.from(set.finish()), OPTIONS);
  const Stub = grpc.makeGenericClientConstructor(definition[service], service);
  return new Stub(address, credentials);
}

function filesOf(address, service, credentials) {
  const client = new grpc.Client(address, credentials);
  const call = client.makeBidiStreamRequest(
    METHOD,
    (request) => Buffer.from(Request.encode(request).finish()),
    (bytes) => Response.toObject(Response.decode(bytes)),
  );
  return new Promise((resolve, reject) => {
    call.on("error", reject);
    call.on("data", (response) => {
      if (response.error_response) reject(new Error(response.error_response.error_message));
      else resolve(response.file_descriptor_response.file_descriptor_proto);
      call.end();
    });
    call.on("end", () => client.close());
    call.write({ file_containing_symbol: service });
  });
}
