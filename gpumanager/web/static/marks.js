// How consumers are told apart: a number, one of twelve colours, and one of three textures. The
// thirteenth has the first colour again, but in another texture.
import {make, draw} from "/dashboard/dom.js";

export const COLOURS = 12, TEXTURES = 3;

const colour = (i) => i % COLOURS;
const texture = (i) => (i + Math.floor(i / COLOURS)) % TEXTURES;

/** The classes of a surface that stands for consumer number `i`. */
export const surface = (i) => `c${colour(i)} t${texture(i)}`;
/** The class of its colour alone. */
export const hue = (i) => "c" + colour(i);
/** The same for SVG. */
export const fill = (i) => `url(#p${i})`;

/** The badge with its number. */
export function badge(i) {
  const element = make("b", String(i + 1), "badge c" + colour(i));
  return element;
}

/** The SVG patterns of `count` consumers, beside those of what belongs to none. */
export function patterns(count) {
  const defs = draw("defs", {});
  for (let i = 0; i < count; i++) {
    const pattern = draw("pattern", {id: "p" + i, width: 8, height: 8, patternUnits: "userSpaceOnUse"});
    pattern.append(draw("rect", {width: 8, height: 8, class: "f" + colour(i)}));
    if (texture(i) === 1) {
      pattern.append(draw("path", {d: "M-2,10L10,-2M-2,2L2,-2M6,10L10,6", class: "grain"}));
    } else if (texture(i) === 2) {
      pattern.append(draw("circle", {cx: 2, cy: 2, r: 1.2, class: "grain dot"}));
      pattern.append(draw("circle", {cx: 6, cy: 6, r: 1.2, class: "grain dot"}));
    }
    defs.append(pattern);
  }
  const foreign = draw("pattern", {id: "p-foreign", width: 8, height: 8, patternUnits: "userSpaceOnUse"});
  foreign.append(draw("rect", {width: 8, height: 8, class: "f-foreign"}),
    draw("path", {d: "M-2,-2L10,10M-2,6L2,10M6,-2L10,2", class: "grain"}));
  defs.append(foreign);
  return defs;
}
