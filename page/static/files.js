"use strict";
// Label files, made here: what is drawn can be saved even if the service is gone.

/** CRC-32 of bytes, as PNG wants it (ISO 3309). */
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}

/** A PNG chunk: length, name, content, check sum. */
function pngChunk(name, content) {
  const chunk = new Uint8Array(12 + content.length);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length);
  [...name].forEach((letter, place) => { chunk[4 + place] = letter.charCodeAt(0); });
  chunk.set(content, 8);
  view.setUint32(8 + content.length, crc32(chunk.subarray(4, 8 + content.length)));
  return chunk;
}

/** A label map as a gray PNG of 16 bits. */
async function labelPng({ width, height, label }) {
  const lines = new DataView(new ArrayBuffer(height * (1 + 2 * width))); // each line begins with 0: no filter
  label.forEach((value, index) => {
    const row = Math.floor(index / width);
    lines.setUint16(row * (1 + 2 * width) + 1 + 2 * (index - row * width), value);
  });
  const packed = new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint16(8, 0x1000); // 16 bits, gray
  return new Blob([
    Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), pngChunk("IHDR", new Uint8Array(header.buffer)),
    pngChunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())), pngChunk("IEND", new Uint8Array(0)),
  ]);
}

/** A label map as an uncompressed gray TIFF of 16 bits, low byte first. */
function labelTiff({ width, height, label }) {
  const [short, long] = [3, 4]; // types; see TIFF 6.0, sections 2 and 4
  const tags = [
    [256, long, width], [257, long, height], [258, short, 16], [259, short, 1], [262, short, 1], [273, long, 0],
    [277, short, 1], [278, long, height], [279, long, 2 * label.length],
  ];
  const start = 8 + 2 + 12 * tags.length + 4;
  const view = new DataView(new ArrayBuffer(start + 2 * label.length));
  view.setUint32(0, 0x49492a00); // "II", 42
  view.setUint32(4, 8, true);
  view.setUint16(8, tags.length, true);
  tags.forEach(([number, type, value], place) => {
    const at = 10 + 12 * place;
    view.setUint16(at, number, true);
    view.setUint16(at + 2, type, true);
    view.setUint32(at + 4, 1, true);
    view.setUint32(at + 8, number === 273 ? start : value, true);
  });
  label.forEach((value, index) => view.setUint16(start + 2 * index, value, true));
  return new Blob([view]);
}

/** Let the browser save a file. */
function save(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
