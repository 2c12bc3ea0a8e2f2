import java.io.*;
import java.math.BigInteger;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.security.*;
import java.security.cert.X509Certificate;
import java.security.spec.*;
import java.time.*;
import java.time.format.DateTimeFormatter;
import java.util.*;
import javax.crypto.*;
import javax.crypto.spec.*;
import org.bouncycastle.asn1.x500.*;
import org.bouncycastle.asn1.x509.*;
import org.bouncycastle.cert.jcajce.*;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.operator.jcajce.*;

// Deployment writes what a key manager in Java would: keystore.p12 by the JDK's KeyStore, with root, module and AES keys, the tables
// key_alias, key_store and data_encrypt_keystore as CSV, and payloads that were encrypted to base keys: NAME.in, in base64url like what is
// in them, NAME.txt, and an attribute of a person. All cryptography is that of the JDK; certificates are put together by BouncyCastle.
public class Deployment {
    static final byte[] SPLITTER = "#KEY_SPLITTER#".getBytes(StandardCharsets.US_ASCII);
    static final SecureRandom random = new SecureRandom();
    static final Base64.Encoder base64 = Base64.getUrlEncoder().withoutPadding();
    static final DateTimeFormatter stamp = DateTimeFormatter.ofPattern("yyyy-MM-dd HH:mm:ss.SSSSSS");

    static Path dir;
    static KeyStore store;
    static char[] password;
    static StringBuilder aliases = new StringBuilder("id,app_id,ref_id,key_gen_dtimes,key_expire_dtimes,status_code,lang_code,cert_thumbprint,uni_ident,cr_by,cr_dtimes\n");
    static StringBuilder stored = new StringBuilder("id,master_key,private_key,certificate_data,cr_by,cr_dtimes\n");

    record Key(String alias, KeyPair pair, X509Certificate certificate) {}

    static byte[] join(byte[]... parts) {
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        for (byte[] p : parts) out.writeBytes(p);
        return out.toByteArray();
    }

    static String hex(byte[] b) { return HexFormat.of().withUpperCase().formatHex(b); }

    static byte[] digest(String algorithm, byte[] b) throws Exception { return MessageDigest.getInstance(algorithm).digest(b); }

    static byte[] bytes(int n) {
        byte[] b = new byte[n];
        random.nextBytes(b);
        return b;
    }

    static byte[] oaep(PublicKey key, byte[] b) throws Exception {
        Cipher c = Cipher.getInstance("RSA/ECB/OAEPWithSHA-256AndMGF1Padding");
        c.init(Cipher.ENCRYPT_MODE, key, new OAEPParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA256, PSource.PSpecified.DEFAULT));
        return c.doFinal(b);
    }

    static byte[] gcm(byte[] key, byte[] iv, byte[] aad, byte[] plain) throws Exception {
        Cipher c = Cipher.getInstance("AES/GCM/NoPadding");
        c.init(Cipher.ENCRYPT_MODE, new SecretKeySpec(key, "AES"), new GCMParameterSpec(128, iv));
        if (aad != null) c.updateAAD(aad);
        return c.doFinal(plain);
    }

    // make makes a key pair and its certificate, with a serial number of a random sign, and writes its row of key_alias.
    static Key make(String app, String ref, LocalDateTime from, int days, Key issuer) throws Exception {
        KeyPairGenerator g = KeyPairGenerator.getInstance("RSA");
        g.initialize(2048);
        KeyPair pair = g.generateKeyPair();
        LocalDateTime to = from.plusDays(days);
        X500Name subject = new X500NameBuilder().addRDN(org.bouncycastle.asn1.x500.style.BCStyle.C, "IN").addRDN(org.bouncycastle.asn1.x500.style.BCStyle.CN, app + "-" + ref).build();
        X500Name by = issuer == null ? subject : X500Name.getInstance(issuer.certificate.getSubjectX500Principal().getEncoded());
        boolean ca = ref.isEmpty();
        X509Certificate c = new JcaX509CertificateConverter().getCertificate(new JcaX509v3CertificateBuilder(by, new BigInteger(64, random).subtract(BigInteger.ONE.shiftLeft(63)),
                Date.from(from.toInstant(ZoneOffset.UTC)), Date.from(to.toInstant(ZoneOffset.UTC)), subject, pair.getPublic())
            .addExtension(Extension.basicConstraints, true, new BasicConstraints(ca))
            .addExtension(Extension.keyUsage, true, new KeyUsage(ca ? KeyUsage.digitalSignature | KeyUsage.keyCertSign : KeyUsage.keyEncipherment))
            .build(new JcaContentSignerBuilder("SHA256withRSA").build((issuer == null ? pair : issuer.pair).getPrivate())));
        String alias = UUID.randomUUID().toString();
        row(alias, app, ref, from, to, hex(digest("SHA-256", c.getEncoded())),
            hex(digest("SHA-1", (app + "_" + ref + "_" + from.format(DateTimeFormatter.ofPattern("MM-dd-yyyy"))).getBytes(StandardCharsets.UTF_8))));
        return new Key(alias, pair, c);
    }

    static void row(String alias, String app, String ref, LocalDateTime from, LocalDateTime to, String thumbprint, String unique) {
        aliases.append(String.join(",", alias, app, ref, stamp.format(from), stamp.format(to), "", "", thumbprint, unique, "system", stamp.format(from))).append("\n");
    }

    static void keep(Key k) throws Exception {
        store.setKeyEntry(k.alias, k.pair.getPrivate(), password, new java.security.cert.Certificate[] {k.certificate});
    }

    // base makes a base key: its private half goes into key_store, wrapped by the module key.
    static Key base(String app, String ref, LocalDateTime from, Key module) throws Exception {
        Key k = make(app, ref, from, 730, module);
        byte[] key = bytes(32), iv = bytes(16);
        byte[] blob = join(oaep(module.pair.getPublic(), key), SPLITTER, gcm(key, iv, null, k.pair.getPrivate().getEncoded()), iv);
        String pem = "-----BEGIN CERTIFICATE-----\n" + Base64.getMimeEncoder(64, "\n".getBytes()).encodeToString(k.certificate.getEncoded()) + "\n-----END CERTIFICATE-----\n";
        stored.append(k.alias + "," + module.alias + "," + base64.encodeToString(blob) + ",\"" + pem + "\",system," + stamp.format(from) + "\n");
        return k;
    }

    // payload encrypts to a key as VER_R2.
    static void payload(String name, Key k) throws Exception {
        byte[] plain = ("what Java has encrypted to " + name).getBytes(StandardCharsets.UTF_8);
        byte[] key = bytes(32), aad = bytes(32);
        byte[] out = join("VER_R2".getBytes(), digest("SHA-256", k.certificate.getEncoded()), oaep(k.pair.getPublic(), key), SPLITTER, aad,
            gcm(key, Arrays.copyOf(aad, 12), aad, plain));
        Files.writeString(dir.resolve(name + ".in"), base64.encodeToString(out));
        Files.writeString(dir.resolve(name + ".txt"), base64.encodeToString(plain) + "\n");
    }

    public static void main(String[] args) throws Exception {
        dir = Path.of(args[0]);
        password = args[1].toCharArray();
        store = KeyStore.getInstance("PKCS12");
        store.load(null, password);
        LocalDateTime now = LocalDateTime.now(ZoneOffset.UTC);
        Key root = make("ROOT", "", now.minusDays(1500), 2920, null);
        keep(root);
        Key old = make("REGISTRATION", "", now.minusDays(1300), 1095, root), module = make("REGISTRATION", "", now.minusDays(200), 1095, root);
        keep(old);
        keep(module);
        Key kernel = make("KERNEL", "", now.minusDays(200), 1095, root);
        keep(kernel);
        KeyGenerator g = KeyGenerator.getInstance("AES");
        g.init(256);
        SecretKey cache = g.generateKey();
        String alias = UUID.randomUUID().toString();
        store.setEntry(alias, new KeyStore.SecretKeyEntry(cache), new KeyStore.PasswordProtection(password));
        row(alias, "KERNEL", "IDENTITY_CACHE", now.minusDays(200), now.plusDays(1600), "", "");
        payload("expired", base("REGISTRATION", "10001_1", now.minusDays(1100), old));
        payload("current", base("REGISTRATION", "10001_1", now.minusDays(100), module));
        payload("other", base("REGISTRATION", "10001_2", now.minusDays(90), module));

        // Random keys of the zero-knowledge encryption, and an attribute that one of them has encrypted.
        Cipher ecb = Cipher.getInstance("AES/ECB/NoPadding");
        ecb.init(Cipher.ENCRYPT_MODE, cache);
        StringBuilder rows = new StringBuilder("id,key,key_status\n");
        for (int i = 0; i < 5; i++) {
            byte[] key = bytes(32);
            rows.append(i + "," + Base64.getEncoder().encodeToString(ecb.doFinal(key)) + ",Active\n");
            if (i != 3) continue;
            Cipher derive = Cipher.getInstance("AES/ECB/NoPadding");
            derive.init(Cipher.ENCRYPT_MODE, new SecretKeySpec(key, "AES"));
            byte[] nonce = bytes(12), aad = bytes(32);
            byte[] sealed = gcm(derive.doFinal(digest("SHA-256", "person-1".getBytes())), nonce, aad, "Ada".getBytes());
            Files.writeString(dir.resolve("attribute.json"), "{\"id\": \"person-1\", \"zkDataAttributes\": [{\"identifier\": \"name\", \"value\": \""
                + base64.encodeToString(join(new byte[] {0, 0, 0, 3}, nonce, aad, sealed)) + "\"}]}");
        }
        Files.writeString(dir.resolve("data_encrypt_keystore.csv"), rows);
        Files.writeString(dir.resolve("key_alias.csv"), aliases);
        Files.writeString(dir.resolve("key_store.csv"), stored);
        try (OutputStream out = Files.newOutputStream(dir.resolve("keystore.p12"))) {
            store.store(out, password);
        }
    }
}
