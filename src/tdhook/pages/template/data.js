// What the page is about, and how it is read: numbers are deflated and in base64.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function unpacked(packed) {
  if (!packed) return null;
  const kinds = { "<f4": Float32Array, "<i2": Int16Array, "|u1": Uint8Array };
  return new kinds[packed.kind](await inflated(packed.data));
}

async function readAll() {
  for (const name of ["taken", "action", "reward", "starts", "ledger"]) data[name] = await unpacked(data[name]);
  data.steps = data.environments * data.time;
  data.episode = new Int32Array(data.steps); // number of the episode within its environment
  data.since = new Int32Array(data.steps); // steps since it began
  data.so_far = new Float64Array(data.steps); // its return
  for (let i = 0; i < data.steps; i++) {
    const fresh = i % data.time === 0;
    const begins = data.starts[i] === 1;
    data.episode[i] = fresh ? 0 : data.episode[i - 1] + (begins ? 1 : 0);
    data.since[i] = begins ? 0 : data.since[i - 1] + 1;
    data.so_far[i] = (begins ? 0 : data.so_far[i - 1]) + (data.reward ? data.reward[i] : 0);
  }
}

// Of several explanations each is read when it is looked at.
async function readView(view) {
  if (view.ready) return;
  [view.relevance, view.values, view.total] = await Promise.all([view.relevance, view.values, view.total].map(unpacked));
  view.observed = view.values ? view.values.length / data.steps : 0;
  view.sizes = Array.from({ length: view.observed }, (_, row) => {
    let size = 0;
    for (let i = row; i < view.values.length; i += view.observed) {
      if (Number.isFinite(view.values[i])) size = Math.max(size, Math.abs(view.values[i]));
    }
    return size || 1;
  });
  view.ready = true;
}

function number(value) {
  if (Number.isNaN(value)) return "not a number";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? size.toExponential(2) : String(Number(size.toPrecision(4)));
  return (value < 0 ? "−" : "") + text;
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const sign = (value) => (value > 0 ? "positive" : value < 0 ? "negative" : "");
