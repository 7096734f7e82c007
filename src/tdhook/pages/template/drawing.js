// Colours, the frame with its relevance, and the bars.
const dark = matchMedia("(prefers-color-scheme: dark)");
// ColorBrewer's RdBu, from against over none to for; in the dark none is dark, and both ends are light.
const RAMPS = {
  light: ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"],
  dark: ["b8dcf8", "79b5e8", "4689c4", "2d5f8f", "243f59", "262b32", "5a302b", "8f4336", "c95b47", "ee8a75", "ffc9bc"],
};
const SHADES = 255;

function shades() {
  const stops = RAMPS[dark.matches ? "dark" : "light"].map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: SHADES }, (_, i) => {
    const place = (i / (SHADES - 1)) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((value, c) => Math.round(value + (place - low) * (stops[low + 1][c] - value)));
  });
}
let palette = shades();

function shade(value, top) {
  const part = Math.max(-1, Math.min(1, value / top));
  return palette[Math.round(((part + 1) / 2) * (SHADES - 1))];
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const actionColour = (action) => css(`--a${action % 8}`);

// Pictures are decoded when they are looked at; some are kept.
class Shelf {
  constructor(make, room) {
    Object.assign(this, { make, room, kept: new Map() });
  }

  get(name) {
    const found = this.kept.get(name) ?? this.make(name);
    this.kept.delete(name);
    this.kept.set(name, found); // the last of a Map is the youngest
    if (this.kept.size > this.room) this.kept.delete(this.kept.keys().next().value);
    return found;
  }
}

const pictures = data.pictures;
const FOR = [235, 45, 45], AGAINST = [45, 120, 255]; // to be seen on black and on white

const imageShelf = new Shelf(async (name) => {
  const [environment, place] = name.split(" ").map(Number);
  const image = new Image();
  image.src = `data:${pictures.kind};base64,${pictures.images[environment][place]}`;
  await image.decode();
  return image;
}, 120);

const mapShelf = new Shelf(async (name) => {
  const [view, environment, place] = name.split(" ").map(Number);
  const values = new Int8Array(await inflated(pictures.maps[view][environment][place]));
  const [height, width] = pictures.shape;
  const pixels = new ImageData(width, height);
  values.forEach((value, i) => pixels.data.set([...(value > 0 ? FOR : AGAINST), Math.abs(value) * 2], 4 * i));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}, 120);

let latest = 0; // only what was asked for last is drawn

async function drawPicture(view, environment, step) {
  if (!pictures) return;
  const turn = ++latest;
  const place = Math.floor(step / pictures.every);
  const [image, map] = await Promise.all([
    pictures.images ? imageShelf.get(`${environment} ${place}`) : null,
    pictures.maps[view] ? mapShelf.get(`${view} ${environment} ${place}`) : null,
  ]);
  if (turn !== latest) return;
  const canvas = element("screen");
  const [width, height] = image ? [image.naturalWidth, image.naturalHeight] : [map.width, map.height];
  const times = Math.max(1, Math.round(480 / Math.max(width, height)));
  if (canvas.width !== width * times || canvas.height !== height * times) {
    [canvas.width, canvas.height] = [width * times, height * times];
    canvas.classList.toggle("coarse", times > 2);
    document.querySelector(".stage").classList.toggle("tall", height > width);
  }
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (image) context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (map && image && element("grey").checked) {
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-over";
  }
  if (map && element("overlay").checked) {
    context.globalAlpha = element("opacity").value / 100;
    context.drawImage(map, 0, 0, canvas.width * pictures.reach[1], canvas.height * pictures.reach[0]);
    context.globalAlpha = 1;
  }
  for (const label of document.querySelectorAll(".of-maps")) label.hidden = !map;
  for (const label of document.querySelectorAll(".of-frames")) label.hidden = !(map && image);
  canvas.setAttribute("aria-label", `${image ? "frame" : "relevance"} of step ${step}${image && map ? ", with its relevance" : ""}`);
  canvas.dataset.step = step;
}

function makeBars(view) {
  const body = element("bars").tBodies[0];
  body.replaceChildren(
    ...view.rows.map((name) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = head.title = name;
      const observed = document.createElement("td");
      observed.className = "observed";
      const track = document.createElement("div");
      track.className = "track";
      track.append(document.createElement("div"));
      const bar = document.createElement("td");
      bar.append(track);
      row.append(head, observed, bar, document.createElement("td"));
      return row;
    }),
  );
  for (const cell of element("bars").querySelectorAll(".observed")) cell.hidden = !view.observed;
}

function drawBars(view, index) {
  const count = view.rows.length;
  [...element("bars").tBodies[0].rows].forEach((row, i) => {
    const value = view.relevance[index * count + i];
    const [, observed, track, text] = row.cells;
    if (view.observed) observed.textContent = i < view.observed ? number(view.values[index * view.observed + i]) : "";
    const bar = track.firstChild.firstChild;
    bar.className = `bar ${sign(value)}`;
    bar.style.width = `calc(${Math.min(1, Math.abs(value) / view.top) * 50}% - 1px)`;
    text.textContent = signed(value);
    text.className = sign(value);
  });
}

function drawRamp(view) {
  const stops = palette.filter((_, i) => i % 2 === 0).map((colour) => `rgb(${colour})`);
  element("ramp").style.background = `linear-gradient(to right, ${stops})`;
  element("ramp").title = `full colour and full bars from ±${number(view.top)}`;
}
