// The card now: who holds it, what is foreign, what is kept free, and what its sensors say.
import {byId, classes, keep, make, tell} from "/dashboard/dom.js";
import {badge, surface} from "/dashboard/marks.js";
import {holding, largest} from "/dashboard/models.js";
import {lasting, mib} from "/dashboard/words.js";

/** What the card's memory is divided into, in the bar's order: {key, name, mib, className, mark}. */
function parts(status) {
  const gpu = status.gpu, found = [];
  status.consumers.forEach((c, i) => {
    if (c.gpu_resident_mib > 0) {
      found.push({key: "c-" + c.name, name: c.name, mib: c.gpu_resident_mib, className: surface(i), mark: i,
        models: holding(c), of: largest(c)});
    }
  });
  const held = found.reduce((sum, part) => sum + part.mib, 0);
  const foreign = gpu.foreign ?? [];
  for (const each of foreign) {
    found.push({key: "f-" + each.pid, mib: each.mib, className: "foreign",
      name: `foreign: ${each.name || "process"} (pid ${each.pid})`});
  }
  const rest = gpu.used_mib - held - foreign.reduce((sum, each) => sum + each.mib, 0);
  if (rest > 0) {
    const name = gpu.memory === "host" ? "this machine's other programs" : "the driver and others";
    found.push({key: "rest", name, mib: rest, className: "rest"});
  }
  const kept = Math.min(gpu.reserved_mib, Math.max(0, gpu.free_mib));
  if (gpu.free_mib - kept > 0) {
    found.push({key: "free", name: "free", mib: gpu.free_mib - kept, className: "free"});
  }
  if (kept > 0) found.push({key: "reserved", name: "reserved", mib: kept, className: "reserved"});
  return found;
}

export function drawCard(status) {
  const gpu = status.gpu, total = Math.max(1, gpu.total_mib), found = parts(status);
  const bar = byId("bar");
  bar.hidden = gpu.total_mib === 0;
  keep(bar, found, (part) => part.key, () => make("span"), (span, part) => {
    classes(span, part.className);
    span.style.width = 100 * part.mib / total + "%";
    drawShares(span, part);
    const marked = part.mark !== undefined && part.mib / total * bar.clientWidth > 32;
    span.querySelector(".badge")?.remove();
    if (marked) span.append(badge(part.mark));
    span.title = part.name + " " + mib(part.mib);
  });
  const words = found.map((part) => part.name + " " + mib(part.mib) + (part.of ? ` (${part.of})` : "")).join(", ");
  bar.setAttribute("aria-label", "Of " + mib(gpu.total_mib) + ": " + words);
  keep(byId("legend"), found, (part) => part.key, () => {
    const item = make("li");
    item.append(make("i"), make("span"), make("strong"));
    item.children[1].append(make("span"), make("span", undefined, "dim why"));
    return item;
  }, (item, part) => {
    const [mark, name, size] = item.children;
    if (part.mark === undefined) classes(mark, "swatch " + part.className);
    else if (mark.tagName !== "B" || mark.textContent !== String(part.mark + 1)) {
      mark.replaceWith(badge(part.mark));
    }
    tell(name.firstChild, part.name);
    tell(name.lastChild, part.of ?? "");
    tell(size, mib(part.mib));
  });
  drawGauges(status);
  byId("gpu-err").hidden = !gpu.err;
  tell(byId("gpu-err"), gpu.err || "");
}

/** The models of a consumer side by side in its part of the bar, with what is none's at the end. */
function drawShares(span, part) {
  const models = part.models?.length > 1 ? part.models : [];
  let before = 0;
  const shares = models.map((model) => {
    const share = {name: model.name, mib: model.held_mib, left: before};
    before += model.held_mib;
    return share;
  });
  const old = [...span.querySelectorAll(".share")];
  old.slice(shares.length).forEach((each) => each.remove());
  shares.forEach((share, n) => {
    const mark = old[n] ?? span.appendChild(make("i", undefined, "share"));
    mark.style.left = 100 * share.left / part.mib + "%";
    mark.style.width = 100 * share.mib / part.mib + "%";
    mark.title = `${part.name}: ${share.name} ${mib(share.mib)}`;
  });
}

function drawGauges(status) {
  const gpu = status.gpu, gauges = [];
  gauges.push({name: "Free for a job", value: mib(Math.max(0, gpu.free_mib - gpu.reserved_mib)),
    share: Math.max(0, gpu.free_mib - gpu.reserved_mib) / Math.max(1, gpu.total_mib)});
  if (gpu.utilization_percent !== undefined) {
    gauges.push({name: "Load", value: gpu.utilization_percent + " %",
      share: gpu.utilization_percent / 100});
  }
  if (gpu.power_w !== undefined) {
    gauges.push({name: "Power", share: gpu.power_limit_w ? gpu.power_w / gpu.power_limit_w : null,
      value: Math.round(gpu.power_w) + (gpu.power_limit_w ? " of " + Math.round(gpu.power_limit_w) : "") + " W"});
  }
  if (gpu.temperature_c !== undefined) {
    gauges.push({name: "Temperature", value: gpu.temperature_c + " °C", share: gpu.temperature_c / 100});
  }
  const s = status.scheduler;
  gauges.push({name: "Jobs so far", value: s.total_jobs}, {name: "Evictions", value: s.evictions});
  if (s.out_of_memory.seen) {
    gauges.push({name: "Out of memory", value: `${s.out_of_memory.seen}, ${s.out_of_memory.healed} healed`});
  }
  if (s.total_jobs) gauges.push({name: "Last run", value: lasting(s.last_run_ms)});
  keep(byId("gauges"), gauges, (gauge) => gauge.name, (gauge) => {
    const group = make("div");
    group.append(make("dt", gauge.name), make("dd"));
    if (gauge.share !== undefined) {
      group.lastChild.append(make("span"), make("span", undefined, "meter"));
      group.querySelector(".meter").append(make("span"));
    }
    return group;
  }, (group, gauge) => {
    const value = group.lastChild;
    if (gauge.share === undefined) return tell(value, gauge.value);
    tell(value.firstChild, gauge.value);
    value.lastChild.hidden = gauge.share === null;
    value.lastChild.firstChild.style.width = 100 * Math.min(1, gauge.share ?? 0) + "%";
  });
}
