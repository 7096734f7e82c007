// Strips over time: what was done, the relevance of each feature, the reward.
const HEIGHTS = { action: 16, reward: 30, axis: 18, gap: 6 };

class Strip {
  constructor(host, choose) {
    this.names = document.createElement("div");
    this.names.className = "names";
    this.field = document.createElement("div");
    this.field.className = "field";
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.cursor = document.createElement("div");
    this.cursor.className = "cursor";
    this.field.append(this.canvas, this.cursor);
    host.replaceChildren(this.names, this.field);
    const point = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const part = Math.max(0, Math.min(0.999999, (event.clientX - box.left) / box.width));
      choose(this.from + Math.floor(part * (this.to - this.from)));
    };
    this.field.addEventListener("pointerdown", (event) => {
      // While it is dragged, the strip keeps what it shows.
      this.held = true;
      this.field.setPointerCapture(event.pointerId);
      point(event);
    });
    this.field.addEventListener("pointermove", (event) => this.held && point(event));
    for (const end of ["pointerup", "pointercancel"]) this.field.addEventListener(end, () => (this.held = false));
  }

  lanes(view) {
    const tall = view.rows.length > 12 ? 18 : 26;
    const lanes = [];
    if (data.taken) lanes.push({ name: "action", height: HEIGHTS.action, kind: "action" });
    view.rows.forEach((name, row) => lanes.push({ name, height: tall, kind: "feature", row }));
    if (data.lowest < data.highest) lanes.push({ name: "reward", height: HEIGHTS.reward, kind: "reward" });
    let top = 6;
    lanes.forEach((lane, i) => {
      if (i && lane.kind !== lanes[i - 1].kind) top += HEIGHTS.gap;
      lane.top = top;
      top += lane.height;
    });
    return [lanes, top];
  }

  // Steps from..to of an environment; several share a column where there are more than pixels.
  draw(view, environment, from, to, lines) {
    Object.assign(this, { from, to });
    const [lanes, bottom] = this.lanes(view);
    this.label(lanes, view);
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(1, this.field.clientWidth);
    const high = bottom + HEIGHTS.axis;
    [this.canvas.width, this.canvas.height] = [Math.round(wide * ratio), Math.round(high * ratio)];
    this.canvas.style.height = `${high}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const columns = Math.min(to - from, Math.round(wide * ratio));
    // Where a column begins, at a whole pixel: seams would show otherwise.
    this.left = (column) => Math.round((column * wide * ratio) / columns) / ratio;
    const edges = Array.from({ length: columns + 1 }, (_, c) => environment * data.time + from + Math.floor((c * (to - from)) / columns));
    for (const lane of lanes) this[lane.kind](context, lane, view, edges, wide, lines);
    this.episodes(context, environment, wide, bottom);
    this.axis(context, wide, bottom);
    this.canvas.setAttribute("aria-label", `relevance of ${view.rows.length} features at steps ${from} to ${to - 1}`);
  }

  label(lanes, view) {
    const key = `${view.label} ${lanes.length}`;
    if (this.labelled === key) return;
    this.labelled = key;
    let bottom = 0;
    this.names.replaceChildren(
      ...lanes.map((lane) => {
        const name = document.createElement("div");
        name.textContent = name.title = lane.name;
        if (lane.kind !== "feature") name.className = "aside";
        name.style.height = name.style.lineHeight = `${lane.height}px`;
        name.style.marginTop = `${lane.top - bottom}px`;
        bottom = lane.top + lane.height;
        return name;
      }),
    );
  }

  action(context, lane, view, edges) {
    const columns = edges.length - 1;
    const colours = data.actions.map((_, i) => actionColour(i));
    for (let c = 0; c < columns; c++) {
      const counts = new Array(data.actions.length).fill(0);
      for (let i = edges[c]; i < edges[c + 1]; i++) counts[data.taken[i]]++;
      let top = lane.top;
      counts.forEach((count, action) => {
        if (!count) return;
        const height = (lane.height * count) / (edges[c + 1] - edges[c]);
        context.fillStyle = colours[action];
        context.fillRect(this.left(c), top, this.left(c + 1) - this.left(c), height);
        top += height;
      });
    }
  }

  feature(context, lane, view, edges, wide, lines) {
    const columns = edges.length - 1;
    const count = view.rows.length;
    const pixels = new ImageData(columns, 1);
    for (let c = 0; c < columns; c++) {
      let sum = 0;
      for (let i = edges[c]; i < edges[c + 1]; i++) sum += view.relevance[i * count + lane.row];
      pixels.data.set([...shade(sum / (edges[c + 1] - edges[c]), view.top), 255], 4 * c);
    }
    const thin = document.createElement("canvas");
    [thin.width, thin.height] = [columns, 1];
    thin.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(thin, 0, lane.top + 1, wide, lane.height - 2);
    if (!lines || lane.row >= view.observed) return;
    const middle = lane.top + lane.height / 2;
    const unit = (lane.height / 2 - 3) / view.sizes[lane.row];
    context.beginPath();
    for (let c = 0; c < columns; c++) {
      let sum = 0;
      for (let i = edges[c]; i < edges[c + 1]; i++) sum += view.values[i * view.observed + lane.row];
      const y = middle - (unit * sum) / (edges[c + 1] - edges[c]);
      if (Number.isFinite(y)) context.lineTo(((c + 0.5) * wide) / columns, y);
    }
    context.strokeStyle = css("--ink");
    context.globalAlpha = 0.75;
    context.lineWidth = 1;
    context.stroke();
    context.globalAlpha = 1;
  }

  reward(context, lane, view, edges, wide) {
    const columns = edges.length - 1;
    const low = Math.min(0, data.lowest), high = Math.max(0, data.highest);
    const unit = (lane.height - 4) / (high - low || 1);
    const zero = lane.top + 2 + high * unit;
    context.fillStyle = css("--soft");
    context.globalAlpha = 0.45;
    for (let c = 0; c < columns; c++) {
      let sum = 0;
      for (let i = edges[c]; i < edges[c + 1]; i++) sum += data.reward[i];
      const height = (unit * sum) / (edges[c + 1] - edges[c]);
      context.fillRect(this.left(c), zero, this.left(c + 1) - this.left(c), -height);
    }
    context.globalAlpha = 1;
    context.fillRect(0, zero, wide, 0.6);
  }

  episodes(context, environment, wide, bottom) {
    const starts = [];
    for (let step = Math.max(1, this.from); step < this.to; step++) {
      if (data.starts[environment * data.time + step]) starts.push(step);
    }
    if (starts.length > wide / 6) return; // they would hide the rest
    context.strokeStyle = css("--ink");
    context.setLineDash([3, 3]);
    for (const step of starts) {
      const x = ((step - this.from) * wide) / (this.to - this.from);
      context.beginPath();
      context.moveTo(x, 0);
      context.lineTo(x, bottom);
      context.stroke();
    }
    context.setLineDash([]);
  }

  axis(context, wide, bottom) {
    const length = this.to - this.from;
    const least = Math.max(1, (length * 70) / wide);
    const ten = 10 ** Math.floor(Math.log10(least));
    const every = [1, 2, 5, 10].map((times) => times * ten).find((size) => size >= least);
    context.fillStyle = css("--soft");
    context.font = "11px system-ui, sans-serif";
    for (let step = Math.ceil(this.from / every) * every; step < this.to; step += every) {
      const x = ((step - this.from + 0.5) * wide) / length;
      context.fillRect(x - 0.5, bottom + 2, 1, 3);
      const half = context.measureText(String(step)).width / 2;
      context.fillText(String(step), Math.max(0, Math.min(wide - 2 * half, x - half)), bottom + 15);
    }
  }

  place(step) {
    this.cursor.style.left = `${((step - this.from + 0.5) * 100) / (this.to - this.from)}%`;
  }
}
