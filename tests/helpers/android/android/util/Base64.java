package android.util;

public final class Base64 {
    public static final int NO_WRAP = 2;

    public static String encodeToString(byte[] content, int flags) {
        if (flags != NO_WRAP) throw new IllegalArgumentException("lines would be wrapped");
        return java.util.Base64.getEncoder().encodeToString(content);
    }
}
