// Building and keeping the page's elements. Nothing here knows what is shown.

export const byId = (id) => document.getElementById(id);

export function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

/** An SVG element; `title` is what the mouse shows over it. */
export function draw(tag, attributes, title) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (title) {
    const words = draw("title", {});
    words.textContent = title;
    element.append(words);
  }
  return element;
}

export function drawText(attributes, text) {
  const element = draw("text", attributes);
  element.textContent = text;
  return element;
}

/** Set text only where it differs, so that a selection in it, and what reads it out, are left alone. */
export function tell(element, text) {
  const words = String(text);
  if (element.textContent !== words) element.textContent = words;
}

export function classes(element, className) {
  if (element.className !== className) element.className = className;
}

/** Make `parent` hold an element for each item, in their order. An element whose key is there
 *  already is kept and only updated, so that its focus survives. */
export function keep(parent, items, keyOf, build, update) {
  const before = new Map();
  for (const child of [...parent.children]) before.set(child.dataset.key, child);
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let element = before.get(key);
    if (element) before.delete(key);
    else {
      element = build(item);
      element.dataset.key = key;
    }
    update(element, item);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const gone of before.values()) {
    const focused = gone.contains(document.activeElement);
    const near = gone.nextElementSibling || gone.previousElementSibling;
    gone.remove();
    // Who stood on a button that is gone stands on its neighbour's, not at the top of the page.
    if (focused) (near?.querySelector("button") || parent.closest("[tabindex]") || document.body).focus();
  }
}

/** A table row of labelled cells; the labels show where the table is too narrow for columns. */
export function row(labels) {
  const tr = make("tr");
  tr.setAttribute("role", "row");
  for (const label of labels) {
    const td = make("td");
    td.setAttribute("role", "cell");
    td.dataset.label = label;
    tr.append(td);
  }
  return tr;
}
