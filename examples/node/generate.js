// Streams an answer:  node generate.js "What is 348 + 575?" [EXECUTOR] [TOKENIZER]
// Ctrl-C cancels the request on the server too.

import { connect } from "./from_protos.js";
import { details } from "./errors.js";

const [content, executorAddress = "localhost:50051", tokenizerAddress = "localhost:50052"] = process.argv.slice(2);
const { executor } = connect(executorAddress, tokenizerAddress);

const request = { chat: { messages: [{ role: "user", content }] }, sampling: { temperature: 0 } };
const call = executor.Generate(request, { deadline: Date.now() + 60_000 });
process.on("SIGINT", () => call.cancel());

try {
  for await (const response of call) {
    if (response.event === "delta" && ["", "final"].includes(response.delta.channel)) {
      process.stdout.write(response.delta.text);
    }
  }
  process.stdout.write("\n");
} catch (error) {
  console.error(`${error.details} (${details(error)?.reason ?? error.code})`);
  process.exitCode = 1;
} finally {
  executor.close();
}
