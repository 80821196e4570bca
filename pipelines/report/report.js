// Makes the report's large charts interactive: zoom, choice of the fit, values under the pointer.
// Without it the page shows the same charts, static.
"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });
  root.classList.add("js");

  const THIN = "\u202f";
  const FACTORS = [20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01];
  const FEWEST = 12; // points in the narrowest range

  function written(value, digits, sign = false) {
    const [whole, rest] = Math.abs(value).toFixed(digits).split(".");
    const text = whole.replace(/\B(?=(\d{3})+$)/g, THIN) + (rest ? "." + rest : "");
    return (value < 0 ? "−" : sign ? "+" : "") + text;
  }

  // About `count` round values in a range, and their labels.
  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const list = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
      list.push([k * step, written(k * step, digits)]);
    }
    return list;
  }

  // The first index whose value is not below the target.
  function position(values, target) {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < target) low = middle + 1; else high = middle;
    }
    return low;
  }

  class Chart {
    constructor(figure, number) {
      this.figure = figure;
      this.svg = figure.querySelector("svg.plot");
      this.readout = figure.querySelector(".readout");
      this.data = JSON.parse(figure.querySelector("script").textContent);
      this.clip = "clip-" + number;
      this.last = this.data.tof.length - 1;
      this.whole = [this.data.tof[0], this.data.tof[this.last]];
      this.range = this.whole;
      this.fit = 0;
      this.root = false;
      for (const fit of this.data.fits) this.complete(fit);
      figure.querySelector(".tools").hidden = false;
      this.listen();
      this.hint();
    }

    // The background comes thinned out; the difference not at all.
    complete(fit) {
      const { measured, every } = this.data;
      const thinned = fit.background;
      fit.background = measured.map((_, i) => {
        const k = Math.floor(i / every), left = thinned[k], right = thinned[k + 1] ?? left;
        return left === null || right === null ? null : left + (right - left) * (i / every - k);
      });
      fit.difference = measured.map((y, i) =>
        y === null || fit.calculated[i] === null ? null : y - fit.calculated[i]);
    }

    hint() {
      this.readout.textContent =
        "Drag over the chart to zoom; double-click, or “whole range”, to go back.";
    }

    // d-spacing of a time of flight, by Newton's method; the inverse is exact.
    tofOf(d) {
      const [difc, difa, difb, zero] = this.data.calibration;
      return difc * d + difa * d * d + difb / d + zero;
    }

    spacingOf(tof) {
      const [difc, difa, difb, zero] = this.data.calibration;
      let d = (tof - zero) / difc;
      for (let n = 0; n < 20; n++) d -= (this.tofOf(d) - tof) / (difc + 2 * difa * d - difb / (d * d));
      return d;
    }

    show(low, high) {
      const { tof } = this.data;
      const least = (FEWEST * (this.whole[1] - this.whole[0])) / this.last;
      let width = Math.min(Math.max(high - low, least), this.whole[1] - this.whole[0]);
      const start = Math.min(Math.max((low + high - width) / 2, tof[0]), this.whole[1] - width);
      this.range = [start, start + width];
      this.draw();
    }

    act(name) {
      const [low, high] = this.range, width = high - low;
      if (name === "in") this.show(low + width / 4, high - width / 4);
      if (name === "out") this.show(low - width / 2, high + width / 2);
      if (name === "left") this.show(low - width / 2, high - width / 2);
      if (name === "right") this.show(low + width / 2, high + width / 2);
      if (name === "all") this.show(...this.whole);
      if (name === "root") {
        this.root = !this.root;
        this.figure.querySelector("[data-act=root]").setAttribute("aria-pressed", this.root);
        this.draw();
      }
    }

    listen() {
      const { figure, svg } = this;
      for (const button of figure.querySelectorAll("[data-act]")) {
        button.addEventListener("click", () => this.act(button.dataset.act));
      }
      for (const choice of figure.querySelectorAll("input[type=radio]")) {
        choice.addEventListener("change", () => {
          this.fit = Number(choice.value);
          for (const element of [svg, figure]) {
            element.classList.forEach((c) => c.startsWith("of-") && element.classList.remove(c));
            element.classList.add("of-" + choice.dataset.system);
          }
          this.draw();
        });
      }
      for (const button of figure.closest("article").querySelectorAll(".go")) {
        button.addEventListener("click", () => {
          const at = this.data.places[button.dataset.place];
          const reach = 12 * Number(button.dataset.width);
          this.show(at - reach, at + reach);
          figure.scrollIntoView({ block: "nearest", behavior: "smooth" });
        });
      }
      svg.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        svg.setPointerCapture(event.pointerId);
        this.start = this.timeAt(event);
      });
      svg.addEventListener("pointermove", (event) => this.point(this.timeAt(event)));
      svg.addEventListener("pointerup", (event) => {
        const { start } = this, end = this.timeAt(event);
        this.start = undefined;
        if (start === undefined) return;
        if (Math.abs(this.x(end) - this.x(start)) < 6) this.point(end);
        else this.show(Math.min(start, end), Math.max(start, end));
      });
      svg.addEventListener("pointercancel", () => { this.start = undefined; this.draw(); });
      svg.addEventListener("pointerleave", () => {
        if (this.start !== undefined) return;
        this.showMarks("");
        this.hint();
      });
      svg.addEventListener("dblclick", () => this.act("all"));
    }

    timeAt(event) {
      const box = this.svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * this.width - this.left) /
        (this.right - this.left);
      const [low, high] = this.range;
      return low + Math.min(Math.max(share, 0), 1) * (high - low);
    }

    showMarks(marks) {
      const layer = this.svg.querySelector(".marks");
      if (layer) layer.innerHTML = marks;
    }

    // Show the values at a time of flight, or what is being selected.
    point(time) {
      const at = this.x(time).toFixed(1), { top, bottom } = this;
      let marks = `<path class="cursor" d="M${at} ${top}V${bottom}"/>`;
      if (this.start !== undefined) {
        const from = this.x(this.start), width = Math.abs(at - from);
        marks = `<rect class="selection" x="${Math.min(at, from)}" y="${top}" width="${width}"` +
          ` height="${bottom - top}"/>`;
      }
      this.showMarks(marks);
      const { tof, measured, sigma } = this.data, fit = this.data.fits[this.fit];
      let i = Math.min(position(tof, time), this.last);
      if (i && time - tof[i - 1] < tof[i] - time) i--;
      const parts = [`${written(tof[i], 1)}${THIN}µs`, `d ${written(this.spacingOf(tof[i]), 4)}${THIN}Å`];
      if (measured[i] === null) parts.push("not measured");
      else {
        parts.push(`measured ${this.value(measured[i])}`);
        if (fit && fit.difference[i] !== null) {
          parts.push(`calculated ${this.value(fit.calculated[i])}`);
          if (sigma[i]) parts.push(`difference ${written(fit.difference[i] / sigma[i], 1, true)}${THIN}σ`);
        }
      }
      const near = fit ? this.reflections(fit, time) : "";
      if (near) parts.push(`reflection ${near}`);
      this.readout.textContent = parts.join("  ·  ");
    }

    value(number) {
      return written(number, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(number) || 1))));
    }

    // Those within a few pixels.
    reflections(fit, time) {
      const reach = 5 * (this.range[1] - this.range[0]) / (this.right - this.left);
      const first = position(fit.tof, time - reach), end = position(fit.tof, time + reach);
      const some = fit.hkl.slice(first, Math.min(end, first + 3)).join(", ");
      return end > first + 3 ? `${some} and ${end - first - 3} more` : some;
    }

    draw() {
      const { svg, data } = this, fit = data.fits[this.fit];
      const width = Math.max(svg.parentNode.clientWidth, 240), narrow = width < 600;
      const height = narrow ? 430 : 536;
      const left = this.left = narrow ? 44 : 66, right = this.right = width - (narrow ? 6 : 12);
      const top = this.top = 44, bottom = this.bottom = height - 44;
      const lower = bottom - (narrow ? 84 : 104), main = lower - 52;
      this.width = width;
      const [low, high] = this.range, { tof } = data;
      const first = Math.max(position(tof, low) - 1, 0);
      const end = Math.min(position(tof, high) + 1, this.last + 1);
      this.x = (time) => left + (time - low) / (high - low) * (right - left);

      const seen = (values) => values.slice(first, end).filter((v) => v !== null);
      let values = seen(data.measured);
      if (fit) values = values.concat(seen(fit.calculated));
      const bend = this.root ? (v) => Math.sign(v) * Math.sqrt(Math.abs(v)) : (v) => v;
      const unbend = this.root ? (v) => Math.sign(v) * v * v : (v) => v;
      let [least, most] = values.length ?
        [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0, 1];
      if (!(most > least)) most = least + 1;
      const span = most - least, room = 0.04 * (bend(most) - bend(least));
      const from = bend(least) - room, to = bend(most) + room;
      const y = (v) => main - (bend(v) - from) / (to - from) * (main - top);

      const curve = (y_, list) => {
        let path = "", down = false;
        for (let i = first; i < end; i++) {
          if (list[i] === null) { down = false; continue; }
          path += `${down ? "L" : "M"}${this.x(tof[i]).toFixed(1)} ${y_(list[i]).toFixed(1)}`;
          down = true;
        }
        return path;
      };
      const text = (at, height_, words, anchor = "middle", kind = "") =>
        `<text class="${kind}" x="${at.toFixed(1)}" y="${height_.toFixed(1)}" text-anchor="${anchor}">${words}</text>`;
      let art = `<clipPath id="${this.clip}"><rect x="${left}" y="${top}" width="${right - left}" height="${bottom - top}"/></clipPath>`;

      for (let i = first; i < end; i++) {
        if (data.measured[i] !== null) continue;
        const begin = Math.max(this.x(tof[i]), left);
        while (i < end && data.measured[i] === null) i++;
        const stop = Math.min(this.x(tof[Math.min(i, this.last)]), right);
        if (stop > begin) art += `<rect class="gap" x="${begin}" y="${top}" width="${stop - begin}" height="${bottom - top}"/>`;
      }
      let marks = ticks(unbend(from), unbend(to), narrow ? 4 : 5);
      if (this.root) { // small values have more room
        const finer = ticks(unbend(from), unbend(to), 25), last = finer.at(-1);
        marks = [...marks, ...finer.filter(([v]) => v > 0 && v < last[0] / 4)];
      }
      const taken = [];
      for (const [v, words] of marks) {
        if (taken.some((place) => Math.abs(place - y(v)) < 20)) continue;
        taken.push(y(v));
        art += `<path class="grid" d="M${left} ${y(v).toFixed(1)}H${right}"/>` + text(left - 7, y(v) + 4, words, "end");
      }
      for (const [t, words] of ticks(low, high, (right - left) / (narrow ? 64 : 110))) {
        art += `<path class="axis" d="M${this.x(t).toFixed(1)} ${bottom}v5"/>` + text(this.x(t), bottom + 20, words);
      }
      for (const [d, words] of ticks(this.spacingOf(low), this.spacingOf(high), (right - left) / (narrow ? 56 : 100))) {
        const at = this.x(this.tofOf(d));
        art += `<path class="axis" d="M${at.toFixed(1)} ${top}v-5"/>` + text(at, top - 11, words);
      }
      art += text(right, height - 5, "time of flight / µs", "end") +
        text(right, 14, '<tspan class="symbol">d</tspan> / Å', "end") +
        text(narrow ? 2 : left, 14, this.root ? "intensity per µs, √ scale" : "intensity per µs", "start");

      let lines = "", measured = "";
      for (let i = first; i < end; i++) {
        if (data.measured[i] !== null) measured += `M${this.x(tof[i]).toFixed(1)} ${y(data.measured[i]).toFixed(1)}h0`;
      }
      const dot = Math.min(Math.max(1.2 * Math.sqrt((right - left) / (end - first)), 2.2), 6);
      lines += `<path class="measured" style="stroke-width: ${dot.toFixed(1)}" d="${measured}"/>`;
      if (fit) {
        const reach = span * 1.08 * (bottom - lower) / (main - top) / 2;
        const largest = seen(fit.difference).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        const factor = FACTORS.find((f) => largest * f <= reach) ?? FACTORS.at(-1);
        const shown = reach / factor;
        const below = (v) => (lower + bottom) / 2 - v / shown * (bottom - lower) / 2;
        lines += `<path class="background" d="${curve(y, fit.background)}"/>` +
          `<path class="calculated" d="${curve(y, fit.calculated)}"/>`;
        for (const [v, words] of ticks(-shown, shown, 4)) {
          art += `<path class="grid" d="M${left} ${below(v).toFixed(1)}H${right}"/>` + text(left - 7, below(v) + 4, words, "end");
        }
        lines += `<path class="difference" d="${curve(below, fit.difference)}"/>`;
        art += `<path class="axis" d="M${left} ${lower}H${right}V${bottom}H${left}Z"/>`;
        const times = factor === 1 ? "" : factor > 1 ? `, ×${THIN}${factor}` : `, ÷${THIN}${Math.round(1 / factor)}`;
        art += text(left + 6, lower + 14, "difference" + times, "start");
        art += this.ticksOf(fit, main, text);
        if (this.fit === 0) art += this.placesAt(lower - 11, text);
      }
      art += `<path class="axis" d="M${left} ${top}H${right}V${main}H${left}Z"/>`;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.innerHTML = art + `<g clip-path="url(#${this.clip})">${lines}</g><g class="marks"></g>`;
    }

    // A line for each reflection; its indices where there is room.
    ticksOf(fit, main, text) {
      const [low, high] = this.range;
      const first = position(fit.tof, low), end = position(fit.tof, high);
      let path = "", words = "";
      const roomy = (this.right - this.left) / Math.max(end - first, 1) > 24;
      let free = -Infinity;
      for (let i = first; i < end; i++) {
        const at = this.x(fit.tof[i]);
        path += `M${at.toFixed(1)} ${main + 5}v10`;
        if (!roomy || at < free) continue;
        words += text(at, main + 27, fit.hkl[i], "middle", "index miller");
        free = at + 36;
      }
      return `<path class="reflections" d="${path}"/>` + words;
    }

    // The worst misfits, by their numbers in the table; the worse ones first.
    placesAt(height, text) {
      const taken = [];
      let marks = "";
      this.data.places.forEach((time, k) => {
        const at = this.x(time);
        if (time < this.range[0] || time > this.range[1]) return;
        if (taken.some((place) => Math.abs(place - at) < 18)) return;
        taken.push(at);
        marks += `<g class="place"><circle cx="${at.toFixed(1)}" cy="${height}" r="8.5"/>` +
          text(at, height + 4, k + 1) + "</g>";
      });
      return marks;
    }
  }

  const charts = [...document.querySelectorAll("figure.chart")].map((f, k) => new Chart(f, k));
  const drawAll = () => {
    for (const chart of charts) chart.draw();
    // For tests of the page: it is ready, and nothing is wider than the window.
    root.dataset.width = root.clientWidth;
    root.dataset.scrollWidth = root.scrollWidth;
  };
  drawAll();
  root.dataset.ready = charts.length;
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
})();
