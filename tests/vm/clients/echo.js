// node echo.js server ADDRESS | client ADDRESS PORT: see test_clients.py.
const http = require("http");
const [role, address, port] = process.argv.slice(2);

if (role === "server") {
  const server = http.createServer((request, response) => {
    let size = 0;
    request.on("data", (piece) => (size += piece.length));
    request.on("end", () =>
      response.end(`${request.headers["x-b3-spanid"]} ${size}\n`));
  });
  server.listen(0, address, () => console.log(server.address().port));
} else {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const call = (method, path, body, headers) =>
    new Promise((resolve, reject) => {
      const options = { agent, host: address, port, method, path, headers };
      const request = http.request(options, (response) => {
        let text = "";
        response.on("data", (piece) => (text += piece));
        response.on("end", () => resolve(text));
      });
      request.on("error", reject);
      request.end(body);
    });
  (async () => {
    process.stdout.write(await call("GET", "/client/get"));
    process.stdout.write(
      await call("POST", "/client/post", Buffer.alloc(100000), {
        "content-length": 100000,
      }));
    process.stdout.write(
      await call("PUT", "/client/chunked", Buffer.alloc(5000), {
        "transfer-encoding": "chunked",
      }));
    agent.destroy();
  })();
}
