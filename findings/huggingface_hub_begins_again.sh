#!/bin/bash
# huggingface_hub 2.4.0 keeps nothing of a file whose download was interrupted:
# the next process asks for it from the first byte. Version 1.1.0 asks for the
# rest ("Range: bytes=..."). The partial file of 2.4.0 has a name of its own for
# each process and is removed, since locks do not hold on some file systems; of
# a shard of 5 GB that broke at the end, all is downloaded again. Measured with
# plain HTTP; the chunk cache of Xet was not tried.
#
# Why it matters to us: `--hf_dir=org/name` downloads shards of 5 GB. What is
# kept are the files that were finished, which is what our documentation says.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 1.1.0 2.4.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "huggingface_hub==$version"
done
cat > "$folder/try.py" <<'PROGRAM'
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

SIZE, COMMIT = 64_000_000, 'c0ffee' + '0' * 34
ranges = []
is_slow = True


class Hub(http.server.BaseHTTPRequestHandler):

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    if '/resolve/' not in self.path:
      self.send_error(404)
      return
    wanted = self.headers.get('Range')
    start = int(wanted.removeprefix('bytes=').rstrip('-')) if wanted else 0
    self.send_response(206 if wanted else 200)
    self.send_header('ETag', '"' + 'a' * 40 + '"')
    self.send_header('X-Repo-Commit', COMMIT)
    self.send_header('Content-Length', str(SIZE - start))
    if wanted:
      self.send_header('Content-Range', f'bytes {start}-{SIZE - 1}/{SIZE}')
    self.end_headers()
    if self.command == 'HEAD':
      return
    ranges.append(start)
    try:
      for _ in range(start, SIZE, 1_000_000):
        self.wfile.write(bytes(min(1_000_000, SIZE - start)))
        start += 1_000_000
        if is_slow:
          time.sleep(0.1)
    except OSError:
      pass


server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = {
  **os.environ,
  'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
  'HF_HOME': sys.argv[1],
  'HF_HUB_DISABLE_PROGRESS_BARS': '1',
  'HF_HUB_DISABLE_XET': '1',
}
code = 'import huggingface_hub as h; h.hf_hub_download("org/name", "model.bin")'
first = subprocess.Popen(
  [sys.executable, '-c', code], env=environment, stderr=subprocess.DEVNULL
)
while not ranges:
  time.sleep(0.1)
time.sleep(4)
first.send_signal(signal.SIGINT)
first.wait()
is_slow = False
subprocess.run([sys.executable, '-c', code], env=environment, check=True)
print('goes on' if ranges[-1] else 'begins again')
PROGRAM
for version in 1.1.0 2.4.0; do
  found=$("$folder/$version/bin/python" "$folder/try.py" "$folder/cache$version")
  echo "huggingface_hub $version: $found"
  case "$version $found" in
    '1.1.0 goes on' | '2.4.0 begins again') ;;
    *) echo 'It behaves otherwise now.'; exit 1 ;;
  esac
done
