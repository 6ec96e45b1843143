# ruby echo.rb server ADDRESS | client ADDRESS PORT: see test_clients.py.
require "net/http"
require "stringio"
require "socket"

role, address, port = ARGV

if role == "server"
  # By hand: WEBrick is no part of Ruby any longer.
  listener = TCPServer.new(address, 0)
  puts listener.addr[1]
  $stdout.flush
  loop do
    Thread.new(listener.accept) do |sock|
      while (line = sock.gets)
        headers = {}
        while (header = sock.gets.chomp) != ""
          name, value = header.split(": ", 2)
          headers[name.downcase] = value
        end
        size = 0
        if headers["transfer-encoding"]
          while (chunk = sock.gets.to_i(16)) > 0
            sock.read(chunk + 2)
            size += chunk
          end
          sock.gets
        else
          size = headers["content-length"].to_i
          sock.read(size)
        end
        body = "#{headers["x-b3-spanid"]} #{size}\n"
        sock.write("HTTP/1.1 200 OK\r\nContent-Length: #{body.size}\r\n\r\n#{body}")
      end
      sock.close
    end
  end
else
  Net::HTTP.start(address, port.to_i) do |http|
    print http.get("/client/get").body
    print http.post("/client/post", "\0" * 100_000).body
    put = Net::HTTP::Put.new("/client/chunked", "Transfer-Encoding" => "chunked")
    put.body_stream = StringIO.new("\0" * 5000)
    print http.request(put).body
  end
end
