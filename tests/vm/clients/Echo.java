// java Echo.java server ADDRESS | client ADDRESS PORT: see test_clients.py.
import com.sun.net.httpserver.HttpServer;
import java.io.ByteArrayInputStream;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

public class Echo {
  public static void main(String[] args) throws Exception {
    if (args[0].equals("server")) {
      HttpServer server = HttpServer.create(new InetSocketAddress(args[1], 0), 0);
      server.createContext("/", exchange -> {
        int size = exchange.getRequestBody().readAllBytes().length;
        String id = exchange.getRequestHeaders().getFirst("x-b3-spanid");
        byte[] body = (id + " " + size + "\n").getBytes();
        exchange.sendResponseHeaders(200, body.length);
        exchange.getResponseBody().write(body);
        exchange.close();
      });
      server.start();
      System.out.println(server.getAddress().getPort());
      return;
    }
    HttpClient client =
        HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    String base = "http://" + args[1] + ":" + args[2] + "/client/";
    call(client, base + "get", "GET", BodyPublishers.noBody());
    call(client, base + "post", "POST", BodyPublishers.ofByteArray(new byte[100000]));
    // A body whose length nobody knows beforehand is sent in chunks.
    call(client, base + "chunked", "PUT", BodyPublishers.ofInputStream(
        () -> new ByteArrayInputStream(new byte[5000])));
  }

  static void call(HttpClient client, String url, String method, BodyPublisher body)
      throws Exception {
    HttpRequest request =
        HttpRequest.newBuilder(URI.create(url)).method(method, body).build();
    System.out.print(client.send(request, BodyHandlers.ofString()).body());
  }
}
