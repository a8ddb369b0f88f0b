package android.media;

import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/** Reads the orientation of a JPEG. */
public final class ExifInterface {
    public static final String TAG_ORIENTATION = "Orientation";
    private final byte[] content;

    public ExifInterface(InputStream stream) throws IOException { content = stream.readAllBytes(); }

    public int getAttributeInt(String tag, int otherwise) {
        int start = new String(content, java.nio.charset.StandardCharsets.ISO_8859_1).indexOf("Exif\0\0") + 6;
        if (start < 6 || !tag.equals(TAG_ORIENTATION)) return otherwise;
        ByteBuffer note = ByteBuffer.wrap(content, start, content.length - start).slice();
        note.order(note.get(0) == 'I' ? ByteOrder.LITTLE_ENDIAN : ByteOrder.BIG_ENDIAN);
        int entries = note.getInt(4);
        for (int entry = 0; entry < note.getShort(entries); entry++)
            if (note.getShort(entries + 2 + 12 * entry) == 0x0112) return note.getShort(entries + 10 + 12 * entry);
        return otherwise;
    }
}
