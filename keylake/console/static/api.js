// The console's server. The key comes with the address, after the #, which browsers send to nobody.

const fromAddress = new URLSearchParams(location.hash.slice(1)).get("key");
if (fromAddress) {
  sessionStorage.setItem("key", fromAddress);
  history.replaceState(null, "", location.pathname);
}
const headers = { "X-Keylake-Console": sessionStorage.getItem("key") ?? "" };

async function answered(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).message ?? message; } catch { /* no body of ours */ }
  throw new Error(message);
}

export async function get(path, parameters = {}) {
  const response = await fetch(`/api/${path}?${new URLSearchParams(parameters)}`, { headers });
  return (await answered(response)).json();
}

export function post(path, body = {}) {
  return upload(path, JSON.stringify(body));
}

export async function upload(path, body) {
  const response = await fetch(`/api/${path}`, { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body });
  await answered(response);
  return response.status === 204 ? null : response.json();
}

export async function download(path, parameters, name) {
  const response = await answered(await fetch(`/api/${path}?${new URLSearchParams(parameters)}`, { headers }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// Server-sent events by fetch, because EventSource cannot send a header. Reconnects until `stop` is called.
export function stream(hat, onData, onState) {
  const control = new AbortController();
  (async () => {
    while (!control.signal.aborted) {
      try {
        const response = await answered(await fetch(`/api/stream?hat=${hat}`, { headers, signal: control.signal }));
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = "";
        for (let part = await reader.read(); !part.done; part = await reader.read()) {
          text += part.value;
          const events = text.split("\n\n");
          text = events.pop();
          for (const event of events) onData(JSON.parse(event.slice("data: ".length)));
          onState("live");
        }
      } catch (error) {
        if (control.signal.aborted) return;
        onState(error.message === "Failed to fetch" ? "the console has stopped" : error.message);
      }
      await new Promise((wake) => setTimeout(wake, 1000));
    }
  })();
  return () => control.abort();
}
