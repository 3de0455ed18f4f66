// A foreign client: examples/node against running services, made from the .proto files and by reflection alone.
//
//     EXECUTOR=host:port TOKENIZER=host:port node --test tests/node/clients.test.js

import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { connect as connectByReflection } from "../../examples/node/by_reflection.js";
import { connect as connectFromProtos, grpc } from "../../examples/node/from_protos.js";
import { details } from "../../examples/node/errors.js";

const { EXECUTOR, TOKENIZER } = process.env;
const { status } = grpc;

const SUM = { chat: { messages: [{ role: "user", content: "What is 12 + 30?" }] }, sampling: { temperature: 0 } };
const HAIKU = { role: "user", content: "Write a haiku about the sea." };
const ENDLESS = { chat: { messages: [HAIKU] }, stopping: { ignore_eos: true, max_tokens: 3000 } };

for (const [name, connect] of [["from the .proto files", connectFromProtos], ["by reflection", connectByReflection]]) {
  describe(name, { timeout: 100_000 }, () => {
    let clients;

    before(async () => (clients = await connect(EXECUTOR, TOKENIZER)));
    after(() => Object.values(clients).forEach((client) => client.close()));

    /** The answer of a unary method, or its error. */
    const ask = (client, method, request = {}) =>
      new Promise((resolve, reject) => {
        client[method](request, { deadline: Date.now() + 50_000 }, (error, answer) =>
          error ? reject(error) : resolve(answer),
        );
      });

    /** Reads a stream to its end: the events, by kind, and the error that ended it, if one did. */
    async function read(call, onEvent = () => {}) {
      const seen = { started: [], delta: [], finished: [], error: null };
      try {
        for await (const response of call) {
          seen[response.event].push(response[response.event]);
          onEvent(seen);
        }
      } catch (error) {
        seen.error = error;
      }
      return seen;
    }

    const untilIdle = async () => {
      const deadline = Date.now() + 30_000;
      while ((await ask(clients.executor, "GetStatus")).num_running > 0) {
        assert.ok(Date.now() < deadline, "the engine still runs what was cancelled");
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    };

    it("streams an answer", async () => {
      const { started, delta, finished, error } = await read(clients.executor.Generate(SUM));
      assert.equal(error, null);
      assert.equal(started.length, 1);
      assert.match(started[0].digest, /^[0-9a-f]{64}$/);
      assert.ok(delta.length > 1, "it came in pieces");
      const answer = delta.filter((each) => each.channel === "final").map((each) => each.text);
      assert.match(answer.join(""), /42/);
      assert.equal(finished.length, 1);
      assert.equal(finished[0].reason, "FINISH_REASON_STOP");
      const numIds = delta.reduce((sum, each) => sum + each.token_ids.length, 0);
      assert.equal(finished[0].usage.num_output_tokens, numIds);
    });

    it("draws the same with the same seed, of 64 bits", async () => {
      const seed = "18446744073709551557";
      const drawn = { ...SUM, sampling: { temperature: 1, seed }, stopping: { max_tokens: 20, ignore_eos: true } };
      const [first, second] = [await read(clients.executor.Generate(drawn)), await read(clients.executor.Generate(drawn))];
      assert.equal(first.started[0].seed, seed);
      const ids = (seen) => seen.delta.flatMap((each) => each.token_ids);
      assert.equal(ids(first).length, 20);
      assert.deepEqual(ids(first), ids(second));
    });

    it("cancels by cancelling the call", async () => {
      const call = clients.executor.Generate(ENDLESS);
      const { started, delta, finished, error } = await read(call, () => call.cancel());
      assert.equal(started.length, 1);
      assert.ok(delta.length < 50);
      assert.equal(finished.length, 0);
      assert.equal(error.code, status.CANCELLED);
      await untilIdle();
    });

    it("cancels by the request's id, from another call", async () => {
      const call = clients.executor.Generate({ ...ENDLESS, request_id: "from-node" });
      let cancelled = null;
      const { started, error } = await read(call, () => {
        cancelled ??= ask(clients.executor, "Cancel", { request_id: "from-node" });
      });
      assert.equal((await cancelled).executor_id, started[0].executor_id);
      assert.equal(error.code, status.CANCELLED);
      assert.equal(details(error).reason, "CANCELLED");
      const gone = await ask(clients.executor, "Cancel", { request_id: "from-node" }).catch((reason) => reason);
      assert.equal(gone.code, status.NOT_FOUND);
      assert.equal(details(gone).reason, "REQUEST_NOT_FOUND");
      await untilIdle();
    });

    it("keeps its deadline", async () => {
      const start = Date.now();
      const { started, finished, error } = await read(clients.executor.Generate(ENDLESS, { deadline: start + 2_000 }));
      assert.ok(Date.now() - start < 30_000);
      assert.equal(error.code, status.DEADLINE_EXCEEDED);
      assert.equal(started.length, 1);
      assert.equal(finished.length, 0);
      await untilIdle();
    });

    it("reads what an error says", async () => {
      const { error } = await read(clients.executor.Generate({ text: "a", sampling: { top_p: 7 } }));
      assert.equal(error.code, status.INVALID_ARGUMENT);
      assert.deepEqual(details(error), { reason: "FIELD_INVALID", field: "sampling.top_p", retryAfter: null, metadata: {} });
      assert.match(error.details, /sampling\.top_p/);
      const unknown = await read(clients.executor.Generate({ text: "a", model: "gpt-9" }));
      assert.equal(unknown.error.code, status.NOT_FOUND);
      assert.equal(details(unknown.error).reason, "MODEL_NOT_FOUND");
      const unbuilt = await read(clients.executor.Generate({ text: "a", constraint: { regex: "a+" } }));
      assert.equal(unbuilt.error.code, status.UNIMPLEMENTED);
    });

    it("tells zero from nothing", async () => {
      const zero = await read(clients.executor.Generate({ text: "a", stopping: { max_tokens: 0 } }));
      assert.equal(details(zero.error).field, "stopping.max_tokens");
      const greedy = { text: "a", sampling: { temperature: 0, top_k: 0 }, stopping: { max_tokens: 2, ignore_eos: true } };
      assert.equal((await read(clients.executor.Generate(greedy))).error, null);
    });

    it("turns text into ids and back", async () => {
      const text = "Ünïted 日本 🚀";
      const { token_ids } = await ask(clients.tokenizer, "Tokenize", { text });
      assert.ok(token_ids.length > 3);
      assert.equal((await ask(clients.tokenizer, "Detokenize", { token_ids })).text, text);
      const generated = await read(clients.executor.Generate({ token_ids: { ids: token_ids }, stopping: { max_tokens: 1 } }));
      assert.deepEqual(generated.started[0].prompt_token_ids, token_ids);
    });

    it("asks for health", async () => {
      assert.equal((await ask(clients.health, "Check", { service: "" })).status, "SERVING");
      const unknown = await ask(clients.health, "Check", { service: "nobody" }).catch((error) => error);
      assert.equal(unknown.code, status.NOT_FOUND);
      const watch = clients.health.Watch({ service: "" });
      const first = await new Promise((resolve, reject) => watch.on("error", reject).once("data", resolve));
      watch.on("error", () => {});
      watch.cancel();
      assert.equal(first.status, "SERVING");
    });

    it("lists models", async () => {
      const { models } = await ask(clients.executor, "ListModels");
      assert.equal(models[0].architecture, "gpt-oss");
      assert.match(models[0].digest, /^[0-9a-f]{64}$/);
    });
  });
}
